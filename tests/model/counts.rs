//! What happened in a run: a model in which something never happens proves nothing about it.

macro_rules! counts {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
        pub struct Counts {
            $($(#[$doc])* pub $name: u64,)*
        }

        impl Counts {
            pub fn add(&mut self, other: &Self) {
                $(self.$name += other.$name;)*
            }

            pub fn all(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($name), self.$name),)*]
            }
        }
    };
}

counts! {
    seeds,
    events,
    records,
    shards,
    trimmed,
    /// Parents that count as finished because the service no longer knows them.
    gone,
    /// Rows of finished shards that the service has forgotten.
    rows_deleted,
    takes,
    /// Shards drained while their worker goes on.
    handovers,
    /// Tasks of shards that ended by themselves.
    died,
    /// Refusals that were the echo of an own update.
    still_ours,
    /// Calls of the state table that took effect without an answer.
    unsure_calls,
    pauses,
    crashes,
    stops,
    /// Stops that came to their end within the grace.
    drained,
    /// Writes that left without a complete answer in time.
    unanswered,
    late_writes,
    /// Writes that put an older value over a newer one: what doubts are for.
    older_over_newer,
    /// Rows of doubts.
    doubts,
    /// Doubts that were settled.
    repairs,
    /// Items that a repair wrote.
    repaired_keys,
}
