//! Actions after a failover, each against a real file, process and server.

mod action_support;
mod common;

use std::collections::BTreeSet;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use action_support::hook::Hook;
use action_support::{actions, at_epoch, moment, regions, run};
use common::eventually;
use common::stand::text_of;
use farshore::actions::course::Course;
use farshore::actions::run_one;

fn file_action(path: &Path, content: &str, more: &str) -> String {
    format!("kind = \"file\"\npath = {path:?}\ncontent = {content:?}\n{more}")
}

/// A script of a test's own, in its own folder. The shell is named where it is run: a file just written
/// may still be open for writing in a process that another test is about to start.
fn script(folder: &Path, text: &str) -> PathBuf {
    let path = folder.join("script");
    std::fs::write(&path, format!("{text}\n")).unwrap();
    path
}

fn command(argv: &[&str], more: &str) -> String {
    format!("kind = \"command\"\ncommand = {argv:?}\n{more}")
}

/// Whether the process `pid` runs: one that is dead and not yet waited for does not.
fn runs(pid: &str) -> bool {
    let stat = text_of(Path::new(&format!("/proc/{}/stat", pid.trim())));
    let state = stat.rsplit(')').next().map(str::trim_start);
    state.is_some_and(|state| !state.is_empty() && !state.starts_with('Z'))
}

#[tokio::test]
async fn a_file_is_replaced_with_its_mode_and_through_links() {
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("active");
    let action = file_action(&path, "{group} {region} {epoch}\n", "");
    run(&action).await.result.unwrap();
    assert_eq!(text_of(&path), "orders us-west-2 7\n");
    assert_eq!(path.metadata().unwrap().mode() & 0o777, 0o644);
    // Again, through a link, over a file with a mode of its own.
    std::fs::write(&path, "old").unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
    let link = temp.path().join("link");
    symlink(&path, &link).unwrap();
    run(&file_action(&link, "{region}", ""))
        .await
        .result
        .unwrap();
    assert_eq!(text_of(&path), "us-west-2");
    assert_eq!(path.metadata().unwrap().mode() & 0o777, 0o640);
    assert!(link.symlink_metadata().unwrap().is_symlink());
    // What it points to is not there yet.
    let (later, link) = (temp.path().join("later"), temp.path().join("early"));
    symlink("later", &link).unwrap();
    run(&file_action(&link, "{region}", ""))
        .await
        .result
        .unwrap();
    assert!(link.symlink_metadata().unwrap().is_symlink());
    assert!(std::fs::read_to_string(&later).is_ok_and(|text| !text.is_empty()));
    // Nothing else is left in the folder.
    assert_eq!(std::fs::read_dir(temp.path()).unwrap().count(), 4);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_sees_the_old_file_or_the_new_one_and_nothing_between() {
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("active");
    let line = "{epoch} ".repeat(2_000);
    let action = file_action(&path, &line, "").replace("\\n", "");
    let done = Arc::new(AtomicBool::new(false));
    at_epoch(&action, 1).await.result.unwrap();
    let reader = std::thread::spawn({
        let (path, done) = (path.clone(), Arc::clone(&done));
        move || {
            let mut seen = BTreeSet::new();
            while !done.load(Ordering::Relaxed) {
                let text = std::fs::read_to_string(&path).unwrap();
                let words: BTreeSet<&str> = text.split_whitespace().collect();
                assert_eq!(words.len(), 1, "half of one file and half of another");
                assert_eq!(text.split_whitespace().count(), 2_000);
                seen.extend(words.into_iter().map(str::to_owned));
            }
            seen
        }
    });
    for epoch in 2..60 {
        at_epoch(&action, epoch).await.result.unwrap();
    }
    done.store(true, Ordering::Relaxed);
    let seen = reader.join().unwrap();
    assert!(seen.len() > 5, "the reader saw only {seen:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_is_told_of_its_new_file() {
    let temp = tempfile::tempdir().unwrap();
    let (file, pid) = (temp.path().join("active"), temp.path().join("pid"));
    let seen = temp.path().join("seen");
    let looks = format!(
        "trap 'cat {file:?} >> {seen:?}' HUP\necho $$ > {pid:?}.new\nmv {pid:?}.new {pid:?}\nwhile :; do sleep 0.02; done"
    );
    let mut command = std::process::Command::new("/bin/sh");
    command
        .arg(script(temp.path(), &looks))
        .stdin(Stdio::null());
    let mut process = common::binary::spawn(command).unwrap();
    eventually("the process runs", Duration::from_secs(5), async || {
        pid.exists()
    })
    .await;
    let tell = format!("pid_file = {pid:?}\n");
    run(&file_action(&file, "{region}\n", &tell))
        .await
        .result
        .unwrap();
    let told = async || text_of(&seen) == "us-west-2\n";
    eventually("it read the new file", Duration::from_secs(5), told).await;
    // Told to go, with another signal.
    let tell = format!("pid_file = {pid:?}\nsignal = \"TERM\"\n");
    run(&file_action(&file, "{region}\n", &tell))
        .await
        .result
        .unwrap();
    let status = process.wait().unwrap();
    assert!(!status.success(), "{status}");
    // Nobody is there any more: the file is written, and the failure says so.
    let once = format!("{tell}retries = 1\n");
    let outcome = at_epoch(&file_action(&file, "{epoch}", &once), 8).await;
    let failure = outcome.result.unwrap_err();
    assert!(
        failure
            .why
            .contains("The file is written, but SIGTERM did not reach"),
        "{failure}"
    );
    assert_eq!((outcome.attempts, text_of(&file).as_str()), (2, "8"));
    std::fs::remove_file(&pid).unwrap();
    let failure = run(&file_action(&file, "x", &once))
        .await
        .result
        .unwrap_err();
    assert!(failure.why.contains("could not be read"), "{failure}");
}

#[tokio::test]
async fn a_file_that_cannot_be_written_is_not_tried_again_and_keeps_what_it_holds() {
    let temp = tempfile::tempdir().unwrap();
    let outcome = run(&file_action(&temp.path().join("no/active"), "x", "")).await;
    let failure = outcome.result.unwrap_err();
    assert_eq!(outcome.attempts, 1);
    assert!(failure.what.contains("file-1 (file)"), "{failure}");
    assert!(failure.next.contains("Create the folder"), "{failure}");
    // A folder is no file: it stays one.
    let folder = temp.path().join("folder");
    std::fs::create_dir(&folder).unwrap();
    let outcome = run(&file_action(&folder, "x", "retries = 0\n")).await;
    outcome.result.unwrap_err();
    assert!(folder.is_dir());
    assert_eq!(std::fs::read_dir(temp.path()).unwrap().count(), 1);
}

#[tokio::test]
async fn a_command_gets_its_arguments_and_the_moment_and_no_shell_reads_them() {
    let temp = tempfile::tempdir().unwrap();
    let out = temp.path().join("out");
    let path = script(
        temp.path(),
        &format!(
            "printf '%s|' \"$@\" > {out:?}\nprintf '%s|' \"$FARSHORE_GROUP\" \"$FARSHORE_REGION\" \"$FARSHORE_PREVIOUS\" \"$FARSHORE_EPOCH\" \"$FARSHORE_REASON\" \"$FARSHORE_ACTION\" >> {out:?}"
        ),
    );
    let argv = [
        "/bin/sh",
        path.to_str().unwrap(),
        "--to={region}",
        "$(touch x); `id`",
        "{reason}",
    ];
    let outcome = run(&command(&argv, "name = \"tell all\"\n")).await;
    outcome.result.unwrap();
    assert_eq!(
        (outcome.name.as_str(), outcome.kind, outcome.attempts),
        ("tell all", "command", 1)
    );
    assert_eq!(
        text_of(&out),
        "--to=us-west-2|$(touch x); `id`|fire in \"AZ 1\"|orders|us-west-2|us-east-1|7|fire in \"AZ 1\"|tell all|"
    );
}

#[tokio::test]
async fn a_command_that_fails_is_tried_again_and_its_last_words_are_kept_short() {
    let temp = tempfile::tempdir().unwrap();
    let tries = temp.path().join("tries");
    let fails_until = |count: u32| {
        format!(
            "echo x >> {tries:?}\nseq 1 20000 >&2\necho 'out of\tluck' >&2\n[ $(wc -l < {tries:?}) -ge {count} ]"
        )
    };
    let path = script(temp.path(), &fails_until(3));
    let argv = ["/bin/sh", path.to_str().unwrap()];
    let outcome = run(&command(&argv, "")).await;
    outcome.result.unwrap();
    assert_eq!(outcome.attempts, 3);
    std::fs::remove_file(&tries).unwrap();
    let outcome = run(&command(&argv, "retries = 1\nrequired = false\n")).await;
    let failure = outcome.result.unwrap_err();
    assert_eq!((outcome.attempts, outcome.required), (2, false));
    assert_eq!(text_of(&tries).lines().count(), 2);
    assert!(failure.why.contains("exit status: 1"), "{failure}");
    assert!(failure.why.ends_with("20000 out of luck"), "{failure}");
    assert!(failure.why.len() < 600, "{} bytes", failure.why.len());
    // What is not there will not be there next time.
    let outcome = run(&command(&["/nonexistent/program"], "")).await;
    assert_eq!(outcome.attempts, 1);
    let failure = outcome.result.unwrap_err();
    assert!(
        failure
            .why
            .contains("/nonexistent/program could not be started"),
        "{failure}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_that_takes_too_long_is_killed_with_its_children() {
    let temp = tempfile::tempdir().unwrap();
    let pids = temp.path().join("pids");
    let path = script(
        temp.path(),
        &format!(
            "trap '' TERM\n(trap '' TERM; sleep 300) &\necho $! >> {pids:?}\necho $$ >> {pids:?}\nwait"
        ),
    );
    let begin = Instant::now();
    let limit = "timeout = \"500ms\"\nretries = 1\n";
    let outcome = run(&command(&["/bin/sh", path.to_str().unwrap()], limit)).await;
    let failure = outcome.result.unwrap_err();
    assert!(
        failure.why.contains("not finished after 500ms"),
        "{failure}"
    );
    assert_eq!(outcome.attempts, 2);
    assert!(outcome.took >= Duration::from_secs(1) && begin.elapsed() < Duration::from_secs(10));
    let pids = text_of(&pids);
    assert_eq!(pids.lines().count(), 4);
    let dead = async || !pids.lines().any(runs);
    eventually("all are dead", Duration::from_secs(5), dead).await;
}

/// What a command leaves behind on purpose lives on, and nobody waits for it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_that_succeeds_may_leave_a_process() {
    let temp = tempfile::tempdir().unwrap();
    let pid = temp.path().join("pid");
    let path = script(temp.path(), &format!("sleep 300 &\necho $! > {pid:?}"));
    let begin = Instant::now();
    run(&command(&["/bin/sh", path.to_str().unwrap()], ""))
        .await
        .result
        .unwrap();
    assert!(begin.elapsed() < Duration::from_secs(5));
    let pid = text_of(&pid);
    assert!(runs(&pid));
    let number = pid
        .trim()
        .parse()
        .ok()
        .and_then(rustix::process::Pid::from_raw);
    rustix::process::kill_process(number.unwrap(), rustix::process::Signal::KILL).unwrap();
}

#[tokio::test]
async fn a_webhook_is_signed_and_says_all() {
    let temp = tempfile::tempdir().unwrap();
    let secret = temp.path().join("secret");
    std::fs::write(&secret, "correct horse\n").unwrap();
    let hook = Hook::start(&[200]).await;
    let action = format!(
        "kind = \"webhook\"\nurl = \"{}\"\nsecret_file = {secret:?}\n",
        hook.url()
    );
    run(&action).await.result.unwrap();
    let [call] = &hook.calls()[..] else { panic!() };
    call.check_signature(b"correct horse");
    assert_eq!(call.header("content-type"), "application/json");
    assert!(call.header("user-agent").starts_with("farshore/"));
    let body = call.json();
    assert_eq!(body["version"], 1);
    assert_eq!(body["event"], "failover");
    assert_eq!(body["group"], "orders");
    assert_eq!(body["region"], "us-west-2");
    assert_eq!(body["previous"], "us-east-1");
    assert_eq!(body["epoch"], 7);
    assert_eq!(body["reason"], "fire in \"AZ 1\"");
    assert!(
        body["text"]
            .as_str()
            .unwrap()
            .contains("orders is active in us-west-2")
    );
}

#[tokio::test]
async fn a_webhook_has_a_body_of_its_own_and_a_secret_of_the_environment() {
    let hook = Hook::start(&[204]).await;
    let body = "body = '{\"text\": \"{region}: {reason}\", \"n\": {epoch}}'\n";
    // Every process has this variable, and no test may set one.
    let secret = std::env::var("PATH").unwrap();
    let action = format!(
        "kind = \"webhook\"\nurl = \"{}\"\n{body}secret_env = \"PATH\"\n",
        hook.url()
    );
    run(&action).await.result.unwrap();
    let [call] = &hook.calls()[..] else { panic!() };
    call.check_signature(secret.trim_ascii_end().as_bytes());
    let expected = serde_json::json!({"text": "us-west-2: fire in \"AZ 1\"", "n": 7});
    assert_eq!(call.json(), expected);
    // Without its secret nothing is sent at all.
    let action = action.replace("\"PATH\"", "\"FARSHORE_TEST_NO_SUCH_SECRET\"");
    let outcome = run(&action).await;
    assert_eq!((outcome.attempts, hook.calls().len()), (1, 1));
    let failure = outcome.result.unwrap_err();
    assert!(
        failure.why.contains("FARSHORE_TEST_NO_SUCH_SECRET"),
        "{failure}"
    );
    assert!(!failure.to_string().contains(&secret));
}

#[tokio::test]
async fn a_webhook_is_sent_again_while_its_server_is_unwell_and_only_then() {
    let hook = Hook::start(&[500, 429, 200]).await;
    let action = |hook: &Hook| format!("kind = \"webhook\"\nurl = \"{}/token\"\n", hook.url());
    let outcome = run(&action(&hook)).await;
    outcome.result.unwrap();
    assert_eq!(outcome.attempts, 3);
    let calls = hook.calls();
    let keys: BTreeSet<&str> = calls
        .iter()
        .map(|call| call.header("idempotency-key"))
        .collect();
    assert_eq!(
        (calls.len(), keys.len()),
        (3, 1),
        "all attempts are one delivery"
    );
    assert!(
        calls
            .iter()
            .all(|call| call.find("farshore-signature").is_none())
    );
    for status in [400, 404, 410, 307] {
        let hook = Hook::start(&[status]).await;
        let outcome = run(&action(&hook)).await;
        let failure = outcome.result.unwrap_err();
        assert_eq!((outcome.attempts, hook.calls().len()), (1, 1), "{status}");
        assert!(
            failure.why.contains(&format!("answered {status}")),
            "{failure}"
        );
        // The rest of the URL may be a secret.
        assert!(!failure.to_string().contains("token"), "{failure}");
    }
    let hook = Hook::start(&[503]).await;
    let outcome = run(&action(&hook)).await;
    assert_eq!((outcome.attempts, hook.calls().len()), (3, 3));
    outcome.result.unwrap_err();
}

#[tokio::test]
async fn a_webhook_that_does_not_answer_is_given_up() {
    let hook = Hook::silent().await;
    let url = hook.url();
    let action = format!("kind = \"webhook\"\nurl = \"{url}\"\ntimeout = \"300ms\"\nretries = 1\n");
    let outcome = run(&action).await;
    assert_eq!((outcome.attempts, hook.calls().len()), (2, 2));
    let failure = outcome.result.unwrap_err();
    assert!(
        failure.why.contains("not finished after 300ms"),
        "{failure}"
    );
    drop(hook);
    let outcome = run(&action).await;
    let failure = outcome.result.unwrap_err();
    assert!(failure.why.contains("did not answer"), "{failure}");
    assert!(failure.why.contains("onnection refused"), "{failure}");
}

/// The failover's own loop: a required action that fails stops it, and the next run goes on there.
#[tokio::test]
async fn actions_stop_at_a_required_one_and_go_on_from_there() {
    let temp = tempfile::tempdir().unwrap();
    let (first, hurdle) = (temp.path().join("first"), temp.path().join("hurdle"));
    let all = actions(&[
        &command(
            &["/bin/sh", "-c", &format!("echo x >> {}", first.display())],
            "",
        ),
        &command(&["/bin/false"], "required = false\nretries = 0\n"),
        &command(
            &["/bin/test", "-e", hurdle.to_str().unwrap()],
            "retries = 0\n",
        ),
        &file_action(&temp.path().join("last"), "{epoch}", ""),
    ]);
    let regions = regions().await;
    let pass = async |done: &BTreeSet<String>| {
        let mut course = Course::new(&all, done);
        while let Some(action) = course.next() {
            course.ended(&run_one(action, &moment(7), &regions).await);
        }
        let labels: Vec<&str> = course.standings().map(|(_, s)| s.label()).collect();
        (course.is_complete(), course.done(), labels)
    };
    let (complete, done, labels) = pass(&BTreeSet::new()).await;
    assert!(!complete);
    assert_eq!(labels, ["done", "failed", "failed", "skipped"]);
    std::fs::write(&hurdle, "").unwrap();
    let (complete, _, labels) = pass(&done).await;
    assert!(complete);
    assert_eq!(labels, ["done-before", "failed", "done", "done"]);
    assert_eq!(text_of(&first), "x\n", "what is done is not done again");
    assert_eq!(text_of(&temp.path().join("last")), "7");
}
