//! Farshore keeps DynamoDB tables alive in a second region: it reads the stream of every table in
//! the active region and replays it into replicas in the region it runs in.
//!
//! # The way of a change
//!
//! ```text
//!  source region                                                             replica region
//!  ─────────────                                                             ──────────────
//!  DescribeStream ─▶ lineage ─▶ leases ─▶ for each shard of ours:
//!                                           read ─▶ decode ─▶ coalesce ─▶ apply ─▶ checkpoint
//!                                                                            └▶ dead letters
//! ```
//!
//! | step | where | what it promises |
//! | --- | --- | --- |
//! | list | [`run::discovery`], [`stream::listing`] | out of everybody's way; paged, paced below the service's limit |
//! | lineage | [`stream::lineage`], [`stream::succession`] (pure) | a child never starts before its parents are finished, a new stream never before the old one |
//! | own | [`lease::rules`] (pure), [`lease::held`], [`lease::table`] | one owner a shard, by conditional writes; nothing is sent once a lease has run out |
//! | share | [`lease::share`] (pure), [`run::fleet`], [`run::member`] | every shard is read, by even shares; handed over drained, never torn away; in a steady fleet nothing moves |
//! | read | [`stream::reader`], [`run::source`] | from the checkpoint to the end of the shard, the last page's records included |
//! | decode | [`stream::answer`], [`stream::change`] | images stay the text that the stream sent: looked through once, spelled anew never ([`dynamo::image`]) |
//! | coalesce | [`apply::coalesce`] (pure) | order per key, one write of a key at a time, and how far everything is durable |
//! | tap | [`run::tap`] | nothing is sent while a person has closed it, or while nobody can know |
//! | budget | [`lease::budget`] (pure), [`lease::budget_keeper`], [`apply::pace`] (pure), [`apply::budget`], [`apply::payment`] | the fleet's shares never add up to more; paid before it is sent, settled by what it took; slower when throttled |
//! | apply | [`apply::batch`] | batches of 25; a rejected one is bisected |
//! | give up | [`dead_letter`], [`run::letter`] | a record the replica can never take is stored before the checkpoint passes it |
//! | halt | [`apply::flood`] (pure), [`run::halt`] | a flood of refusals is no poison: the table stops and a person is called |
//! | bring home | [`jobs::redrive`], [`repair`] | a letter is deleted only after its key is as in the source |
//! | compare | [`jobs::reconcile`]: [`join`](jobs::reconcile::join), [`judge`](jobs::reconcile::judge), [`ledger`](jobs::reconcile::ledger) (pure); [`run::audit`] | one scan a side; in flight is not drift; repaired by key; shared, and gone on with |
//! | copy, mend gaps | [`lease::gaps`] (pure), [`run::whole`], [`run::job`] | drained and pinned before anything is compared; closed once verified |
//! | checkpoint | [`run::shard`] | follows the data, never the reading |
//! | in doubt | [`lease::doubts`] (pure), [`run::doubts`], [`repair`] | a write that may take effect late is repaired by key once it no longer can |
//! | be seen | [`observe::recovery`], [`observe::headline`], [`observe::view`] (pure); [`run::seen`] | the recovery point is never shown younger than the truth |
//!
//! # The house
//!
//! * [`cli`] holds the commands; `main` only turns their [`error::Exit`] into an exit code.
//! * [`run`] puts the worker together and stops it in order; [`run::table`] follows a table,
//!   [`run::stream`] one of its streams, [`run::shard`] a shard.
//! * [`lease::control`] (pure) decides which region is active.
//! * [`actions`] tell everybody else after a failover; [`observe::whereabouts`] answers those who ask,
//!   and [`run::records`] knows it.
//! * [`jobs`] are one-shot: provision, redrive, reconcile. What writes holds a row ([`lease::hold`]).
//! * [`error`] maps every error to one policy, and holds the sentences that people read.
//! * [`dynamo`] makes the SDK clients, and knows items, keys and tables.
//! * [`observe`] is what the outside sees: metrics, health, status. [`observe::liveness`] (pure) says what a
//!   missing sign of life means; [`run::vital`] and the supervision in [`run`] heal it.
//! * `embedded` (cargo feature) is a DynamoDB inside the program, and a gateway that does to it
//!   what AWS does.

pub mod actions;
pub mod apply;
pub mod backoff;
pub mod cli;
pub mod config;
pub mod dead_letter;
pub mod dynamo;
#[cfg(feature = "embedded")]
pub mod embedded;
pub mod error;
pub mod jobs;
pub mod lease;
pub mod mutation;
pub mod observe;
pub mod repair;
pub mod run;
pub mod stream;

#[cfg(test)]
mod semantics_tests;
