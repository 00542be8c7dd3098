//! Seeds that failed once. The long lane always runs them, too.

pub const ONCE_FAILED: &[u64] = &[];
