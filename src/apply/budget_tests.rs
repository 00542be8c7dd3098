use std::time::Instant;

use super::*;

#[tokio::test]
async fn a_cost_above_the_burst_waits_and_is_no_error() {
    let budget = Budget::new(Some(1_000));
    let start = Instant::now();
    budget.spend(250).await;
    assert!(
        start.elapsed() >= Duration::from_millis(240),
        "{:?}",
        start.elapsed()
    );
    Budget::new(None).spend(u32::MAX).await;
    Budget::new(Some(0)).spend(u32::MAX).await;
}

#[tokio::test]
async fn one_unit_a_second_is_a_budget_too() {
    let budget = Budget::new(Some(1));
    let more = tokio::time::timeout(Duration::from_millis(200), budget.spend(1)).await;
    assert!(more.is_err());
    // What was dropped took nothing.
    budget.spend(1).await;
}

/// Units are not dealt out among all who wait, who would then all send at once.
#[tokio::test]
async fn who_waits_is_served_in_turn_and_whole() {
    let budget = Arc::new(Budget::new(Some(100)));
    let start = Instant::now();
    let all = (0..5).map(|_| {
        let budget = Arc::clone(&budget);
        async move {
            budget.spend(10).await;
            start.elapsed().as_millis()
        }
    });
    let ended = futures::future::join_all(all).await;
    for (place, ms) in ended.iter().enumerate() {
        let due = 100 * (place as u128 + 1);
        assert!((due - 5..due + 90).contains(ms), "{ended:?}");
    }
}

#[tokio::test]
async fn a_share_is_waited_for_and_ends_by_itself() {
    let hungry = Arc::new(Notify::new());
    let budget = Budget::shared(true, Arc::clone(&hungry));
    let none = tokio::time::timeout(Duration::from_millis(50), budget.spend(1)).await;
    assert!(none.is_err());
    let told = tokio::time::timeout(Duration::from_millis(50), hungry.notified()).await;
    assert!(told.is_ok(), "somebody waits");
    assert!(budget.usage().waited >= Duration::from_millis(40));
    budget.set_share(1_000.0, uptime() + Duration::from_millis(100));
    assert_eq!(budget.share(), 1_000.0);
    budget.spend(10).await;
    assert!(!budget.remaining().is_zero());
    tokio::time::sleep(Duration::from_millis(110)).await;
    assert_eq!((budget.share(), budget.rate()), (0.0, 0.0));
    assert!(budget.remaining().is_zero());
    let over = tokio::time::timeout(Duration::from_millis(50), budget.spend(1)).await;
    assert!(over.is_err());
    // Who waits is woken.
    let woken = async {
        tokio::time::sleep(Duration::from_millis(20)).await;
        budget.set_share(1_000.0, Duration::MAX);
    };
    let start = Instant::now();
    tokio::join!(budget.spend(10), woken);
    assert!(start.elapsed() < Duration::from_millis(300));
}

#[tokio::test]
async fn throttling_slows_only_where_that_is_asked_for() {
    for (adaptive, rate) in [(true, 700.0), (false, 1_000.0)] {
        let budget = Budget::fixed(Some(1_000), adaptive);
        budget.throttled(uptime());
        assert!((budget.rate() - rate).abs() < 5.0, "{}", budget.rate());
        assert_eq!(budget.share(), 1_000.0);
        let lane = budget.lane();
        assert!(lane.rate().is_infinite());
        lane.throttled(uptime());
        assert_eq!(lane.rate().is_finite(), adaptive);
    }
}

#[tokio::test]
async fn the_price_follows_what_writes_were_found_to_cost() {
    let budget = Budget::new(None);
    for _ in 0..60 {
        budget.learn(25.0, 75.0);
    }
    assert!((budget.price() - 3.0).abs() < 0.1, "{}", budget.price());
    budget.learn(25.0, 10_000.0);
    assert!(budget.price() < 4.0, "one answer is no price");
    budget.learn(0.0, 10.0);
    budget.learn(10.0, 0.0);
    for _ in 0..600 {
        budget.learn(25.0, 0.001);
    }
    assert_eq!(budget.price(), PRICES.0);
}

/// A lane that was free is slowed by throttling, and goes on at what is left.
#[tokio::test]
async fn a_lane_that_is_throttled_goes_on_slower() {
    let budget = Budget::fixed(None, true);
    let lane = budget.lane();
    let costs = [1.0; 25];
    for _ in 0..4 {
        let sent = uptime();
        let charge = lane.take(&costs).await;
        lane.throttled(sent);
        lane.settle(charge.units, Some(0.0));
    }
    let start = Instant::now();
    let mut taken = 0;
    while start.elapsed() < Duration::from_secs(1) {
        taken += lane.take(&costs).await.count;
    }
    let rate = lane.rate();
    assert!((80.0..200.0).contains(&rate), "{rate}");
    assert!(
        (f64::from(taken as u32) - rate).abs() < 0.3 * rate,
        "{taken} at {rate}"
    );
}
