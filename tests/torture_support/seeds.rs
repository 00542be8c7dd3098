//! Seeds that failed once. The long lane always runs them, too.

pub const ONCE_FAILED: &[u64] = &[
    // Failed repairs tried again at once kept the state table from answering on a starved machine.
    1_695_628_965,
];
