//! Single safeguards, turned off to see the tests fail (cargo feature `failpoints`, tests only).
//!
//! A test that passes with its safeguard off proves nothing. `.ci/mutations` turns each off in turn
//! (`FARSHORE_TEST_MUTATION=doubts`) and expects the test that guards it to fail. Without the
//! feature every question is answered "no" at compile time.

/// A safeguard that can be turned off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mutation {
    /// A write is not checked again when it is transmitted.
    Transmit,
    /// Unanswered writes and leases that were not released put nothing in doubt.
    Doubts,
    /// A child starts beside its parent.
    Parents,
    /// The checkpoint passes one record that is not durable.
    Checkpoint,
    /// A lease's owner is named without a nonce.
    Nonce,
}

impl Mutation {
    /// Its name in the environment.
    pub const fn name(self) -> &'static str {
        match self {
            Mutation::Transmit => "transmit",
            Mutation::Doubts => "doubts",
            Mutation::Parents => "parents",
            Mutation::Checkpoint => "checkpoint",
            Mutation::Nonce => "nonce",
        }
    }
}

/// Whether the safeguard is turned off.
#[cfg(feature = "failpoints")]
pub fn is_off(mutation: Mutation) -> bool {
    static CHOSEN: std::sync::OnceLock<Option<String>> = std::sync::OnceLock::new();
    CHOSEN
        .get_or_init(|| std::env::var("FARSHORE_TEST_MUTATION").ok())
        .as_deref()
        == Some(mutation.name())
}

/// Whether the safeguard is turned off: never.
#[cfg(not(feature = "failpoints"))]
pub const fn is_off(_mutation: Mutation) -> bool {
    false
}
