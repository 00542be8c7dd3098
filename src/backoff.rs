//! Waiting between attempts: exponential, bounded, with jitter.

use std::time::Duration;

/// Doubles from a first pause up to a bound, and starts over after a success.
#[derive(Debug, Clone)]
pub struct Backoff {
    first: Duration,
    longest: Duration,
    next: Duration,
}

impl Backoff {
    /// Pauses from `first` to `longest`.
    pub fn new(first: Duration, longest: Duration) -> Self {
        Self {
            first,
            longest,
            next: first,
        }
    }

    /// The next pause: a random length between half of the current bound and all of it, so that
    /// many waiters do not come back together.
    pub fn pause(&mut self) -> Duration {
        let bound = self.next;
        self.next = (bound * 2).min(self.longest);
        bound.mul_f64(rand::random_range(0.5..=1.0))
    }

    /// Starts over.
    pub fn reset(&mut self) {
        self.next = self.first;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_a_bound_and_start_over() {
        let ms = Duration::from_millis;
        let mut backoff = Backoff::new(ms(100), ms(400));
        for bound in [100, 200, 400, 400] {
            let pause = backoff.pause();
            assert!(
                pause >= ms(bound / 2) && pause <= ms(bound),
                "{pause:?} {bound}"
            );
        }
        backoff.reset();
        assert!(backoff.pause() <= ms(100));
    }
}
