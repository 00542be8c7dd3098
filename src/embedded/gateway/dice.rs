//! Chance from one seed. Every decision is a pure function of the seed, what is being decided
//! and how many times it was decided before, so that one number repeats a run: calls that arrive
//! in another order still draw the same sequence for each fault.

use std::fmt;

use super::hash::{hash_bytes, mix};

/// The variable that overrides the seed of every gateway of a test run.
pub const SEED_VARIABLE: &str = "FARSHORE_TEST_SEED";

/// The number that decides everything a gateway leaves to chance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seed(u64);

impl Seed {
    /// The given seed, unless [`SEED_VARIABLE`] holds a number: then that one.
    pub fn new(seed: u64) -> Self {
        let asked = std::env::var(SEED_VARIABLE).ok();
        Self(asked.and_then(|s| s.trim().parse().ok()).unwrap_or(seed))
    }

    /// A seed nobody chose, unless [`SEED_VARIABLE`] holds a number.
    pub fn random() -> Self {
        Self::new(rand::random::<u32>().into())
    }

    /// The number to hand to [`SEED_VARIABLE`] for the same run again.
    pub fn number(self) -> u64 {
        self.0
    }

    /// The same chance for another purpose: gateways that share a seed, one for each region, must
    /// not strike in step.
    pub(crate) fn of(self, purpose: &str) -> Self {
        Self(self.bits(purpose, 0))
    }

    /// 64 bits for the `count`th decision about `what`.
    pub(crate) fn bits(self, what: &str, count: u64) -> u64 {
        let about = hash_bytes(what.as_bytes());
        mix(self.0 ^ mix(about ^ mix(count)))
    }

    /// A number in [0, 1) for the `count`th decision about `what`.
    pub(crate) fn fraction(self, what: &str, count: u64) -> f64 {
        // 53 bits fill a double's mantissa exactly.
        (self.bits(what, count) >> 11) as f64 / (1u64 << 53) as f64
    }
}

impl fmt::Display for Seed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_draws_the_same_again_and_another_seed_draws_otherwise() {
        let draw = |seed: u64| -> Vec<u64> { (0..8).map(|n| Seed(seed).bits("cut", n)).collect() };
        assert_eq!(draw(7), draw(7));
        assert_ne!(draw(7), draw(8));
    }

    #[test]
    fn chance_is_even_over_its_range() {
        let mean = (0..10_000).map(|n| Seed(1).fraction("x", n)).sum::<f64>() / 10_000.0;
        assert!((0.48..0.52).contains(&mean), "{mean}");
    }
}
