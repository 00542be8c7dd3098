//! The lane of those who watch: a real Prometheus with the alerts that are shipped, and a real browser with the
//! page, look at one worker under load while it is driven from one trouble into the next and back.

mod common;
mod suite;
mod watchers_support;

use std::io::Write;
use std::process::Stdio;
use std::time::{Duration, Instant};

use common::binary::Worker;
use common::eventually;
use farshore::observe::view::{Shard, View};
use serde_json::json;
use watchers_support::browser::Browser;
use watchers_support::prometheus::{Prometheus, compared};
use watchers_support::scene::Scene;
use watchers_support::{get, grafana, pictures, program};

/// Longest wait for the page to say something.
const WITHIN: Duration = Duration::from_secs(60);

/// Pictures at three widths, by day and by night; nothing may stick out at the side of any.
fn look(browser: &mut Browser, name: &str) {
    let mut wide = Vec::new();
    for width in [375, 768, 1_600] {
        for (is_dark, scheme) in [(false, "light"), (true, "dark")] {
            browser.resize(width, is_dark);
            let file = pictures().join(format!("{name}-{width}-{scheme}.png"));
            wide.extend(browser.picture(&file).err());
        }
    }
    assert!(wide.is_empty(), "{wide:#?}");
}

/// As [`look`], and nothing was complained of.
fn look_in_peace(browser: &mut Browser, name: &str) {
    look(browser, name);
    let complaints = browser.complaints();
    assert!(complaints.is_empty(), "{name}: {complaints:#?}");
}

fn promtool(arguments: &[&str], input: &str) {
    let mut child = program("promtool")
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(input.as_bytes())
        .unwrap();
    let output = child.wait_with_output().unwrap();
    let told = [output.stdout, output.stderr].concat();
    let told = String::from_utf8_lossy(&told);
    assert!(output.status.success(), "promtool {arguments:?}: {told}");
}

#[test]
#[ignore = "needs promtool: .ci/watchers installs it"]
fn promtool_finds_nothing_in_what_is_shipped() {
    promtool(&["check", "config", "config/prometheus.yml"], "");
    promtool(&["check", "rules", "config/prometheus-rules.yml"], "");
    promtool(&["test", "rules", "config/prometheus-rules-test.yml"], "");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
#[ignore = "needs Prometheus, Chromium and ministack: .ci/watchers and .ci/peers install them"]
async fn a_worker_is_watched_through_all_its_troubles() {
    let scene = Scene::set().await;
    let worker = scene.worker().await;
    let standby = Worker::start(&scene.config_of_the_active_region());
    let prometheus = Prometheus::start(&[worker.port(), standby.port()]).await;
    let stands_by = async || standby.metric("farshore_standby").await == 1.0;
    eventually("the other region's worker stands by", WITHIN, stands_by).await;
    let mut browser = Browser::start();
    let page = format!("http://127.0.0.1:{}/", worker.port());

    browser.open(&page);
    under_load(&scene, &mut browser);
    an_outage(&scene, &prometheus, &mut browser).await;
    a_pause(&scene, &prometheus, &mut browser).await;
    a_gap(&scene, &prometheus, &mut browser).await;
    dead_letters(&scene, &prometheus, &mut browser).await;
    let worker = a_death(&scene, &prometheus, &mut browser, worker).await;
    everything_that_is_asked_is_answered(&scene, &prometheus, &worker).await;
    standing_by(&standby, &mut browser).await;

    scene.fall_quiet();
    let calm = async || prometheus.firing().await.is_empty();
    eventually("no alert is left", WITHIN, calm).await;
    assert!(worker.stop().await.success());
    assert!(standby.stop().await.success());
}

fn under_load(scene: &Scene, browser: &mut Browser) {
    browser.wait_for(
        &[
            "in sync",
            "OK",
            &scene.table,
            "live",
            "us-east-1",
            "us-west-2",
        ],
        WITHIN,
    );
    // Some records a second, by the history that the page draws.
    let rate = "line.view.history.points.at(-1)?.recordsPerSecond > 0";
    let start = Instant::now();
    while browser.eval(rate) != json!(true) {
        assert!(start.elapsed() < WITHIN, "no records a second");
        std::thread::sleep(Duration::from_millis(200));
    }
    look_in_peace(browser, "load");
}

async fn an_outage(scene: &Scene, prometheus: &Prometheus, browser: &mut Browser) {
    let faults = scene.throttle();
    let said = [
        "ACT NOW",
        "cannot write to us-west-2 since",
        "throttled",
        "cannot be written",
    ];
    browser.wait_for(&said, WITHIN);
    prometheus.wait_for("FarshoreOutage", true).await;
    look_in_peace(browser, "outage");
    assert!(faults.iter().any(|fault| fault.hits() > 0));
    faults.iter().for_each(|fault| fault.off());
    prometheus.wait_for("FarshoreOutage", false).await;
    browser.wait_for(&["in sync"], WITHIN);
}

async fn a_pause(scene: &Scene, prometheus: &Prometheus, browser: &mut Browser) {
    scene.command(&[
        "pause",
        "--reason",
        "bad release writes <b>nulls</b>",
        "--apply",
    ]);
    let said = [
        "paused by alice",
        "bad release writes <b>nulls</b>",
        "farshore resume",
        "tap closed",
    ];
    browser.wait_for(&said, WITHIN);
    prometheus.wait_for("FarshorePausedLong", true).await;
    look_in_peace(browser, "paused");
    scene.command(&["resume", "--reason", "mended", "--apply"]);
    prometheus.wait_for("FarshorePausedLong", false).await;
    browser.wait_for(&["in sync"], WITHIN);
}

async fn a_gap(scene: &Scene, prometheus: &Prometheus, browser: &mut Browser) {
    scene.forget();
    browser.wait_for(
        &["never applied", "trimmed", "farshore reconcile --apply"],
        WITHIN,
    );
    prometheus.wait_for("FarshoreGap", true).await;
    look_in_peace(browser, "gap");
    scene.command(&["reconcile", "--table", &scene.table, "--apply"]);
    prometheus.wait_for("FarshoreGap", false).await;
    browser.wait_for(&["in sync", "No gap"], WITHIN);
}

async fn dead_letters(scene: &Scene, prometheus: &Prometheus, browser: &mut Browser) {
    scene.poison().await;
    browser.wait_for(
        &["3 letters wait", "validation", "farshore redrive --apply"],
        WITHIN,
    );
    prometheus
        .wait_for("FarshoreDeadLettersWaiting", true)
        .await;
    prometheus.wait_for("FarshoreDeadLettered", true).await;
    look_in_peace(browser, "dead-letters");
    scene.mend().await;
    scene.command(&["redrive", "--apply"]);
    prometheus
        .wait_for("FarshoreDeadLettersWaiting", false)
        .await;
    browser.wait_for(&["None waits"], WITHIN);
}

/// Each expression of the dashboard, and each side of what a rule compares, gives data of a worker at work.
async fn everything_that_is_asked_is_answered(
    scene: &Scene,
    prometheus: &Prometheus,
    worker: &Worker,
) {
    // Some writes are tried again.
    let faults = scene.throttle();
    let retried = async || worker.metric("farshore_retries_total").await > 0.0;
    eventually("a write is tried again", WITHIN, retried).await;
    faults.iter().for_each(|fault| fault.off());
    let group = scene.stand.group();
    let mut asked = grafana::expressions(&group);
    assert!(asked.len() > 40, "{}", asked.len());
    for rule in prometheus.rules().await {
        let sides = compared(&rule.query).into_iter();
        asked.extend(sides.map(|side| (rule.name.clone(), side)));
    }
    // A rate needs two scrapes of what has just begun.
    let start = Instant::now();
    loop {
        let mut silent = Vec::new();
        for (who, expression) in &asked {
            if prometheus.series(expression).await == 0 {
                silent.push(format!("{who}: {expression}"));
            }
        }
        if silent.is_empty() {
            break;
        }
        assert!(start.elapsed() < WITHIN, "no data for {silent:#?}");
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    let (_, metrics) = get(worker.port(), "/metrics").await.unwrap();
    promtool(&["check", "metrics"], &metrics);
}

/// The worker is killed: the page says so and greys, the alert fires though the other region's worker stands
/// by, and both are well once it is started again, with an audit from then on.
async fn a_death(
    scene: &Scene,
    prometheus: &Prometheus,
    browser: &mut Browser,
    worker: Worker,
) -> Worker {
    worker.kill();
    browser.wait_for(
        &[
            "The worker has not answered since",
            "no answer",
            "farshore status",
        ],
        WITHIN,
    );
    assert_eq!(
        browser.eval("document.body.classList.contains('stale')"),
        json!(true)
    );
    prometheus.wait_for("FarshoreNobodyFeeds", true).await;
    look(browser, "death");
    scene.audit();
    let worker = scene.worker().await;
    prometheus.wait_for("FarshoreNobodyFeeds", false).await;
    browser.wait_for(&["live", "in sync"], WITHIN);
    assert_eq!(
        browser.eval("document.body.classList.contains('stale')"),
        json!(false)
    );
    // Nothing but that it could not reach its worker.
    let complaints = browser.complaints().into_iter();
    let others: Vec<_> = complaints
        .filter(|told| !told.contains("\"network\""))
        .collect();
    assert!(others.is_empty(), "{others:#?}");
    worker
}

async fn standing_by(standby: &Worker, browser: &mut Browser) {
    browser.open(&format!("http://127.0.0.1:{}/", standby.port()));
    browser.wait_for(&["standby: this region is active", "not fed"], WITHIN);
    look_in_peace(browser, "standby");
}

/// A server of the page that answers a view that no worker has to be brought into.
async fn serve(view: &View) -> u16 {
    use axum::routing::get;

    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let view = view.clone();
    let router = axum::Router::new()
        .route("/", get(farshore::observe::page::page))
        .route(
            "/status",
            get(move || std::future::ready(axum::Json(view.clone()))),
        );
    tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
    port
}

fn example() -> View {
    serde_json::from_str(include_str!("view/status.json")).unwrap()
}

/// The shards of a large fleet: one without owner, one of unknown age, all others well.
fn thousand_shards() -> Vec<Shard> {
    let view = example();
    let first = view.shards.first().unwrap();
    let shard = |number: u32| {
        let id = format!(
            "shardId-{:020}-{number:08x}",
            1_795_734_000_000_u64 + u64::from(number)
        );
        Shard {
            shard: id,
            owner: (number != 700)
                .then(|| format!("host-{}#00c0ffee00c0ffee.0badcafe", number % 9)),
            alive: number != 700,
            age_seconds: (number != 800).then_some(f64::from(number % 30) / 10.0),
            ..first.clone()
        }
    };
    (0..1_000).map(shard).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs Chromium: .ci/watchers installs it"]
async fn a_thousand_shards_show_in_a_second() {
    let view = View {
        shards: thousand_shards(),
        ..example()
    };
    let port = serve(&view).await;
    let mut browser = Browser::start();
    browser.resize(1_600, false);
    browser.open(&format!("http://127.0.0.1:{port}/"));
    browser.wait_for(
        &["1,000 shards", "1 without a living owner", "Show all"],
        WITHIN,
    );
    let rows = "[...document.querySelectorAll('#shards tbody tr')].map(row => row.innerText)";
    let shown = browser.eval(rows);
    let shown = shown.as_array().unwrap();
    // Those to look at come first.
    assert!(
        shown[0].as_str().unwrap().contains("no owner"),
        "{}",
        shown[0]
    );
    assert!(
        shown[1].as_str().unwrap().contains("unknown"),
        "{}",
        shown[1]
    );
    assert!(shown.len() < 100, "{}", shown.len());
    // A new page's first answer, and all thousand in one go, each with the layout that it takes.
    let whole = "page.shards.grid.all = true; page.shards.grid.rows.forEach(row => row.remove()); page.shards.grid.rows.clear();";
    for (what, before) in [("the first", ""), ("all", whole)] {
        // The best of three: what it costs, and not what else the machine does.
        let took = (0..3).map(|_| {
            let took = browser.eval(&format!(
                "{{ {before} const begin = performance.now(); showAll(line.view); document.body.offsetHeight; performance.now() - begin }}"
            ));
            took.as_f64().unwrap()
        });
        let took = took.fold(f64::INFINITY, f64::min);
        println!("{what} of 1,000 shards in {took:.0} ms");
        assert!(took < 1_000.0, "{what}: {took} ms");
    }
    assert_eq!(
        browser.eval("document.querySelectorAll('#shards tbody tr').length"),
        json!(1_000)
    );
    look_in_peace(&mut browser, "thousand");
    browser.eval("byId('shards-filter').value = 'host-3 0000002'; byId('shards-filter').dispatchEvent(new Event('input'))");
    browser.wait_for(&["found of 1,000 shards"], WITHIN);
    let found = browser.eval(rows);
    assert!(!found.as_array().unwrap().is_empty());
    for row in found.as_array().unwrap() {
        let row = row.as_str().unwrap();
        assert!(row.contains("host-3") && row.contains("0000002"), "{row}");
    }
}

/// What names and reasons contain is text, wherever it is shown, and however long it is.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs Chromium: .ci/watchers installs it"]
async fn names_are_text_and_never_markup() {
    let evil = format!(
        "<img src=x onerror=\"document.title='taken'\"><script>taken</script>'&{}",
        "W".repeat(90)
    );
    let mut value = serde_json::to_value(example()).unwrap();
    fill(&mut value, &evil);
    let view: View = serde_json::from_value(value).unwrap();
    let port = serve(&view).await;
    let mut browser = Browser::start();
    browser.open(&format!("http://127.0.0.1:{port}/"));
    browser.wait_for(&["<img src=x", "<script>taken</script>"], WITHIN);
    look_in_peace(&mut browser, "names");
    assert_eq!(
        browser.eval("document.querySelectorAll('img').length"),
        json!(0)
    );
    assert_eq!(
        browser.eval("document.querySelectorAll('script').length"),
        json!(1)
    );
    assert_ne!(browser.eval("document.title"), json!("taken"));
    // Neither the policy nor the page lets anything else run.
    let ran = "new Promise(done => { const script = document.createElement('script'); script.textContent = 'window.ran = true'; document.body.append(script); setTimeout(() => done(window.ran === true), 50); })";
    assert_eq!(browser.eval(ran), json!(false));
    assert_eq!(browser.complaints().len(), 1, "the policy says so");
}

/// Puts `text` in the place of every text that a person or another program chooses.
fn fill(value: &mut serde_json::Value, text: &str) {
    const CHOSEN: &[&str] = &[
        "group", "name", "source", "target", "table", "owner", "by", "reason", "text", "next",
        "detail", "id", "code", "class", "position", "shard", "label",
    ];
    match value {
        serde_json::Value::Object(fields) => {
            for (name, field) in fields {
                match field.is_string() && CHOSEN.contains(&name.as_str()) {
                    true => *field = json!(text),
                    false => fill(field, text),
                }
            }
        }
        serde_json::Value::Array(items) => items.iter_mut().for_each(|item| fill(item, text)),
        _ => {}
    }
}

/// Keyboard and screen reader: landmarks, headings, tables with names, a way past the head, and a voice for
/// the headline.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs Chromium: .ci/watchers installs it"]
async fn it_can_be_heard_and_used_without_a_mouse() {
    let view = example();
    let port = serve(&view).await;
    let mut browser = Browser::start();
    browser.resize(375, false);
    browser.open(&format!("http://127.0.0.1:{port}/"));
    browser.wait_for(&[&view.headline.text], WITHIN);
    let spoken = browser.spoken();
    let count = |role: &str| spoken.iter().filter(|(one, _)| one == role).count();
    for landmark in ["banner", "main", "contentinfo", "navigation", "search"] {
        assert_eq!(count(landmark), 1, "{landmark}");
    }
    let heard = |role: &str, name: &str| {
        spoken
            .iter()
            .any(|(one, text)| one == role && text.contains(name))
    };
    assert!(heard("heading", &view.headline.text));
    assert!(heard("heading", "Shards") && heard("heading", "Gaps"));
    // On a phone, where rows are laid out as cards, they are still rows of a table.
    assert!(
        count("table") >= 6 && count("row") > 10 && count("columnheader") > 20,
        "{spoken:#?}"
    );
    assert!(
        spoken
            .iter()
            .all(|(role, name)| role != "table" || !name.is_empty())
    );
    assert!(heard("image", "Recovery point, the last hour"));
    // Said once, in a region that is read aloud.
    let said = browser.eval("document.getElementById('said').textContent");
    assert_eq!(said, json!(format!("ACT NOW: {}", view.headline.text)));
    browser.press("Tab", 9);
    assert_eq!(
        browser.eval("document.activeElement.className"),
        json!("skip")
    );
    assert_eq!(
        browser.eval("document.activeElement.getBoundingClientRect().top >= 0"),
        json!(true)
    );
    for _ in 0..30 {
        browser.press("Tab", 9);
        if browser.eval("document.activeElement.id") == json!("shards-filter") {
            return;
        }
    }
    panic!("the filter cannot be reached by the keyboard");
}
