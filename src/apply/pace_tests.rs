use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

const EVER: Duration = Duration::MAX;

fn at(seconds: f64) -> Duration {
    Duration::from_secs_f64(seconds)
}

#[test]
fn an_item_dearer_than_a_second_is_paid_before_it_is_sent() {
    let mut bucket = Bucket::new(100.0, EVER, at(0.0));
    let wait = bucket.take(&[400.0], at(0.0)).unwrap_err();
    assert_eq!(wait, Some(at(4.0)));
    assert!(bucket.take(&[400.0], at(3.99)).is_err());
    assert_eq!(bucket.take(&[400.0], at(4.0)), Ok((1, 400.0)));
    assert!(bucket.take(&[1.0], at(4.0)).is_err());
}

#[test]
fn a_batch_leaves_in_parts_that_the_burst_covers() {
    let mut bucket = Bucket::new(100.0, EVER, at(0.0));
    assert_eq!(bucket.take(&[1.0; 25], at(0.1)), Ok((10, 10.0)));
    assert_eq!(
        bucket.take(&[1.0; 15], at(5.0)),
        Ok((10, 10.0)),
        "no more is saved up"
    );
    let mut large = Bucket::new(4_000.0, EVER, at(0.0));
    assert_eq!(large.take(&[1.0; 25], at(0.1)), Ok((25, 25.0)));
}

/// It must not wait for a burst that grows away from it.
#[test]
fn a_rate_that_grows_is_no_reason_to_wait() {
    let mut adaptive = Adaptive::default();
    adaptive.cut(at(0.0), 1_000.0, 0.0, at(0.0));
    let mut bucket = Bucket::new(0.0, EVER, at(0.0));
    let (mut now, mut sent) = (0.0, 0);
    while now < 1.0 {
        bucket.set(adaptive.of(1_000.0, at(now)), EVER, at(now));
        match bucket.take(&[1.0; 500], at(now)) {
            Ok((count, _)) => sent += count,
            Err(wait) => now += wait.unwrap().as_secs_f64().max(0.001),
        }
    }
    assert!((600..770).contains(&sent), "{sent}");
}

#[test]
fn a_debt_is_paid_first_and_what_was_too_much_comes_back() {
    let mut bucket = Bucket::new(100.0, EVER, at(0.0));
    assert!(bucket.take(&[10.0], at(1.0)).is_ok());
    bucket.settle(-50.0);
    assert_eq!(bucket.take(&[10.0], at(1.0)), Err(Some(at(0.6))));
    assert!(bucket.take(&[10.0], at(1.6)).is_ok());
    bucket.settle(10.0);
    assert!(bucket.take(&[10.0], at(1.6)).is_ok());
    bucket.settle(1_000.0);
    assert_eq!(
        bucket.take(&[1.0; 25], at(1.6)),
        Ok((10, 10.0)),
        "no more than the burst"
    );
}

#[test]
fn nothing_is_spent_of_a_share_that_is_over() {
    let mut bucket = Bucket::new(100.0, at(2.0), at(0.0));
    assert!(bucket.take(&[1.0], at(1.99)).is_ok());
    assert_eq!(bucket.take(&[1.0], at(2.0)), Err(None));
    bucket.set(100.0, at(10.0), at(5.0));
    assert!(
        bucket.take(&[1.0], at(5.0)).is_err(),
        "nothing was saved up meanwhile"
    );
    assert!(bucket.take(&[1.0], at(5.01)).is_ok());
    bucket.set(0.0, at(10.0), at(6.0));
    assert_eq!(bucket.take(&[30.0], at(6.0)), Err(None));
}

#[test]
fn throttling_cuts_by_a_part_once_for_what_left_together_and_passes() {
    let mut adaptive = Adaptive::default();
    assert_eq!(adaptive.of(1_000.0, at(0.0)), 1_000.0);
    adaptive.cut(at(1.0), 1_000.0, 0.0, at(1.1));
    assert!((adaptive.of(1_000.0, at(1.1)) - 700.0).abs() < 1e-6);
    for _ in 0..10 {
        adaptive.cut(at(1.05), 1_000.0, 0.0, at(1.1));
    }
    assert!(
        (adaptive.of(1_000.0, at(1.1)) - 700.0).abs() < 1e-6,
        "they left before it"
    );
    adaptive.cut(at(1.2), 1_000.0, 0.0, at(1.3));
    assert!(
        adaptive.of(1_000.0, at(1.3)) > 700.0,
        "the first may not show yet"
    );
    adaptive.cut(at(1.36), 1_000.0, 0.0, at(1.4));
    let cut = adaptive.of(1_000.0, at(1.4));
    assert!(cut < 520.0, "{cut}");
    let mut before = cut;
    let mut recovered = None;
    for step in 1..400 {
        let now = 1.4 + f64::from(step) / 10.0;
        let rate = adaptive.of(1_000.0, at(now));
        assert!(rate >= before && rate - before < 12.0, "{before} to {rate}");
        before = rate;
        if rate == 1_000.0 {
            recovered.get_or_insert(now);
        }
    }
    assert!(recovered.is_some_and(|at| at < 10.0), "{recovered:?}");
}

#[test]
fn a_rate_without_a_limit_is_cut_from_what_was_spent_and_grows_back_to_none() {
    let mut adaptive = Adaptive::default();
    adaptive.cut(at(1.0), f64::INFINITY, 5_000.0, at(1.0));
    assert!((adaptive.of(f64::INFINITY, at(1.0)) - 7_000.0).abs() < 1e-6);
    for step in 0..100 {
        let now = at(2.0 + f64::from(step) * 0.26);
        adaptive.cut(now, f64::INFINITY, 5_000.0, now);
    }
    let mut now = 30.0;
    let least = adaptive.of(f64::INFINITY, at(28.0));
    assert!((1.0..200.0).contains(&least), "{least}");
    while adaptive.of(f64::INFINITY, at(now)).is_finite() {
        now += 0.1;
        assert!(now < 150.0);
    }
}

/// A share that is taken away for a while must not make it forget.
#[test]
fn throttling_is_not_forgotten_while_there_is_no_share() {
    let mut adaptive = Adaptive::default();
    adaptive.cut(at(1.0), 1_000.0, 0.0, at(1.0));
    assert_eq!(adaptive.of(0.0, at(1.1)), 0.0);
    assert!(adaptive.of(1_000.0, at(1.2)) < 750.0);
}

#[derive(Debug, Clone)]
enum Step {
    Passes(u32),
    Rate(u32),
    Take(Vec<u32>),
    Over,
}

proptest! {
    /// In every window of time no more is spent than the rate allows, the burst and one item.
    #[test]
    fn no_window_holds_more_than_rate_burst_and_one_item(
        steps in vec(
            prop_oneof![
                3 => (1u32..500).prop_map(Step::Passes),
                1 => (0u32..1_000).prop_map(Step::Rate),
                6 => vec(1u32..400, 1..25).prop_map(Step::Take),
                1 => Just(Step::Over),
            ],
            1..200,
        ),
    ) {
        const RATE: f64 = 1_000.0;
        let mut bucket = Bucket::new(RATE, EVER, at(0.0));
        let (mut now, mut spent, mut dearest) = (0.0, Vec::new(), 0.0f64);
        for step in steps {
            match step {
                Step::Passes(ms) => now += f64::from(ms) / 1_000.0,
                // Never more than the whole.
                Step::Rate(rate) => bucket.set(f64::from(rate), EVER, at(now)),
                Step::Over => bucket.set(RATE, at(now), at(now)),
                Step::Take(costs) => {
                    let costs: Vec<f64> = costs.into_iter().map(f64::from).collect();
                    if let Ok((count, cost)) = bucket.take(&costs, at(now)) {
                        prop_assert!(count >= 1 && count <= costs.len());
                        prop_assert!((costs[..count].iter().sum::<f64>() - cost).abs() < 1e-6);
                        dearest = dearest.max(costs[0]);
                        spent.push((now, cost));
                    }
                }
            }
        }
        let burst = RATE * BURST.as_secs_f64();
        for first in 0..spent.len() {
            let mut sum = 0.0;
            for (when, cost) in &spent[first..] {
                sum += cost;
                let window = when - spent[first].0;
                prop_assert!(
                    sum <= window * RATE + burst + dearest + 1e-3,
                    "{sum} in {window} s"
                );
            }
        }
    }
}
