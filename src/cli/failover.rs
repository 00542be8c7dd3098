//! `farshore failover`: another region becomes the active one.

mod show;

use std::time::Duration;

use super::one_shot::Line;
use crate::config::read::Loaded;
use crate::dynamo::Regions;
use crate::error::{Exit, Failure};
use crate::jobs::failover::planned::{prepare, reopen};
use crate::jobs::failover::ttl;
use crate::jobs::failover::{Ended, Failover, Survey, Watcher, survey, unaccepted};

/// How long a planned switchover may take unless it is said otherwise.
const WITHIN: &str = "5m";

/// The loss of not having looked for late writes.
const LATE_WRITES: &str = "late-writes";

/// Arguments of `failover`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The region that is to become active, by its label
    #[arg(long, value_name = "LABEL")]
    to: String,
    /// Waits until everything is applied before it switches, and gives up cleanly if that takes too long
    #[arg(long)]
    planned: bool,
    /// How long --planned may take
    #[arg(long, value_name = "DURATION", default_value = WITHIN, value_parser = humantime::parse_duration)]
    within: Duration,
    /// Why; stored in the control record
    #[arg(long, value_name = "TEXT", default_value = "failover")]
    reason: String,
    /// Goes on although this is missing in the target: a name that the plan gives, once for each
    #[arg(long, value_name = "NAME")]
    accept_loss: Vec<String>,
    /// Does it; without it nothing is changed
    #[arg(long)]
    apply: bool,
    /// Answers as JSON
    #[arg(long)]
    json: bool,
}

pub(super) async fn run(loaded: Loaded, args: &Args) -> Result<Exit, Failure> {
    super::provision::refuse_embedded(&loaded, "failover")?;
    let reason = super::tap::checked_reason(&args.reason)?;
    let regions = Regions::connect(&loaded.config).await?;
    let survey = survey(&loaded, &regions, &args.to).await?;
    refuse_unknown_losses(&survey, args)?;
    if !args.apply {
        let ttls = match ttl::source(&survey, &regions) {
            Some(source) => ttl::look(&loaded.config, source, survey.state()).await,
            None => Vec::new(),
        };
        show::plan(&loaded, &survey, &ttls, args).await?;
        return Ok(Exit::Remains);
    }
    if !survey.is_under_way() {
        refuse_losses(&survey, args)?;
    }
    let stop = super::stop_on_signal()?;
    let mut line = Progress::new(args.json);
    let by = super::tap::who();
    let switch = async {
        let applied = match args.planned && !survey.is_under_way() {
            true => {
                let why = (by.as_str(), reason.as_str());
                let config = &loaded.config;
                Some(prepare(config, &survey, why, args.within, &mut line, &stop).await?)
            }
            false => None,
        };
        let config = &loaded.config;
        let why = (by.as_str(), reason.as_str());
        let closed = applied.as_ref().map(|row| row.at.clone());
        let begun = Failover::begin(config, &survey, why, applied, &regions, &stop).await;
        if let (Err(_), Some(at)) = (&begun, &closed) {
            // The epoch did not change: writes need not wait.
            reopen(&survey, (&by, at)).await;
        }
        let mut failover = begun?;
        failover.accepts_unwatched = args.accept_loss.iter().any(|name| name == LATE_WRITES);
        failover.run(&mut line).await
    };
    let switched = switch.await;
    drop(line);
    match switched {
        Ok(report) => show::done(&survey, &report, args),
        Err(Ended::Failed(failure) | Ended::Overtaken(failure)) => Err(failure),
        Err(Ended::Action(stopped)) => {
            let (failure, actions) = *stopped;
            show::stopped_at_action(&survey, &failure, &actions, args)?;
            Ok(Exit::Remains)
        }
        Err(Ended::GivenUp(why)) => {
            show::given_up(&survey, &why, args)?;
            Ok(Exit::Remains)
        }
        Err(Ended::Stopped) => {
            eprintln!("cut short: type the same command again, and it goes on where it stopped");
            Ok(Exit::Interrupted)
        }
    }
}

/// A loss that is accepted and is none is a mistake: something else was meant.
fn refuse_unknown_losses(survey: &Survey, args: &Args) -> Result<(), Failure> {
    // What was accepted when it began may be over by now.
    if survey.is_under_way() {
        return Ok(());
    }
    let losses = survey.all_losses();
    let is_known =
        |name: &&String| *name == LATE_WRITES || losses.iter().any(|(known, _)| known == *name);
    let Some(unknown) = args.accept_loss.iter().find(|name| !is_known(name)) else {
        return Ok(());
    };
    let names: Vec<&str> = losses.iter().map(|(name, _)| name.as_str()).collect();
    Err(Failure::new(
        format!("There is no loss `{unknown}` to accept"),
        match names.is_empty() {
            true => format!("Nothing is missing in {}", survey.to),
            false => format!("What is missing in {}: {}", survey.to, names.join(", ")),
        },
        "Look at the plan, without --apply, and name what it names",
    ))
}

fn refuse_losses(survey: &Survey, args: &Args) -> Result<(), Failure> {
    let losses = survey.all_losses();
    let open = unaccepted(&losses, &args.accept_loss);
    if open.is_empty() {
        return Ok(());
    }
    let whys: Vec<String> = open
        .iter()
        .map(|(name, why)| format!("{name} ({why})"))
        .collect();
    let flags: Vec<String> = open
        .iter()
        .map(|(name, _)| format!("--accept-loss {name}"))
        .collect();
    Err(Failure::new(
        format!("{} is not fit to become active", survey.to),
        format!("This is missing there: {}", whys.join("; ")),
        format!(
            "Wait until it is whole, or say that it may be lost: {}",
            flags.join(" ")
        ),
    ))
}

/// Tells how far it is: a line that changes on a terminal, a line for each step elsewhere.
pub(super) struct Progress {
    line: Line,
    said: String,
}

impl Progress {
    /// `quiet`: only what is reached.
    pub(super) fn new(quiet: bool) -> Self {
        Self {
            line: Line::new(quiet),
            said: String::new(),
        }
    }
}

impl Watcher for Progress {
    fn under_way(&mut self, what: &str) {
        if self.said != what {
            what.clone_into(&mut self.said);
            tracing::info!("{what}");
            self.line.say(what.to_owned());
        }
    }

    fn reached(&mut self, what: &str) {
        self.line.above(what);
    }
}
