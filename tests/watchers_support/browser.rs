//! Chromium without a window, spoken to by its DevTools protocol over a pipe: JSON messages that end in a
//! zero byte. It needs no client but this.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::program;
use crate::common::binary::spawn;
use crate::common::stand::text_of;

/// Longest wait for an answer: a busy machine takes its time for a picture.
const PATIENCE: Duration = Duration::from_secs(60);

/// The pipe is expected at the descriptors 3 and 4; what it prints goes to its log.
const PIPE: &str = r#"log=$1; shift; exec "$@" 3<&0 4>&1 </dev/null >"$log" 2>&1"#;

const FLAGS: &[&str] = &[
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
];

/// A browser with one page; it ends with this value.
pub struct Browser {
    child: Child,
    orders: Option<ChildStdin>,
    said: Receiver<Value>,
    events: VecDeque<Value>,
    next: u64,
    session: Option<String>,
    home: TempDir,
}

impl Browser {
    /// Starts one with an empty profile.
    pub fn start() -> Self {
        // Looked for first: `sh` would only say so in its log.
        drop(program("chromium"));
        let home = tempfile::tempdir().unwrap();
        let mut command = program("sh");
        command
            .args(["-c", PIPE, "sh"])
            .arg(home.path().join("log"));
        command.arg("chromium").args(FLAGS);
        command.arg(format!(
            "--user-data-dir={}",
            home.path().join("profile").display()
        ));
        command.arg("about:blank").env("HOME", home.path());
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = spawn(command).unwrap();
        let orders = child.stdin.take();
        let mut answers = BufReader::new(child.stdout.take().unwrap());
        let (say, said) = channel();
        std::thread::spawn(move || {
            let mut message = Vec::new();
            while answers
                .read_until(0, &mut message)
                .is_ok_and(|read| read > 0)
            {
                message.pop();
                if let Ok(value) = serde_json::from_slice(&message)
                    && say.send(value).is_err()
                {
                    return;
                }
                message.clear();
            }
        });
        let mut browser = Self {
            child,
            orders,
            said,
            events: VecDeque::new(),
            next: 0,
            session: None,
            home,
        };
        let target = browser.call("Target.createTarget", json!({ "url": "about:blank" }));
        let attach = json!({ "targetId": target["targetId"], "flatten": true });
        let session = browser.call("Target.attachToTarget", attach);
        browser.session = session["sessionId"].as_str().map(str::to_owned);
        for domain in ["Page", "Runtime", "Log", "Accessibility"] {
            browser.call(&format!("{domain}.enable"), json!({}));
        }
        browser
    }

    /// Calls a method of the protocol, and waits for its answer.
    pub fn call(&mut self, method: &str, parameters: Value) -> Value {
        self.next += 1;
        let mut order = json!({ "id": self.next, "method": method, "params": parameters });
        if let Some(session) = &self.session {
            order["sessionId"] = json!(session);
        }
        let mut bytes = serde_json::to_vec(&order).unwrap();
        bytes.push(0);
        self.orders.as_mut().unwrap().write_all(&bytes).unwrap();
        let start = Instant::now();
        loop {
            let left = PATIENCE.saturating_sub(start.elapsed());
            let answer = match self.said.recv_timeout(left) {
                Ok(answer) => answer,
                Err(RecvTimeoutError::Timeout) => panic!("chromium does not answer {method}"),
                Err(RecvTimeoutError::Disconnected) => {
                    panic!(
                        "chromium ended:\n{}",
                        text_of(&self.home.path().join("log"))
                    )
                }
            };
            if answer["id"] == json!(self.next) {
                assert!(answer["error"].is_null(), "{method}: {}", answer["error"]);
                return answer["result"].clone();
            }
            self.events.push_back(answer);
        }
    }

    /// What an expression of the page's own language gives, as JSON.
    pub fn eval(&mut self, expression: &str) -> Value {
        let asked =
            json!({ "expression": expression, "returnByValue": true, "awaitPromise": true });
        let answer = self.call("Runtime.evaluate", asked);
        let thrown = &answer["exceptionDetails"];
        assert!(thrown.is_null(), "{expression}: {thrown}");
        answer["result"]["value"].clone()
    }

    /// The text that a person reads.
    pub fn text(&mut self) -> String {
        let text = self.eval("document.body ? document.body.innerText : ''");
        text.as_str().unwrap_or_default().to_owned()
    }

    /// Loads a page.
    pub fn open(&mut self, url: &str) {
        let answer = self.call("Page.navigate", json!({ "url": url }));
        assert!(
            answer["errorText"].is_null(),
            "{url}: {}",
            answer["errorText"]
        );
    }

    /// Waits until the page's text contains all of `parts`.
    pub fn wait_for(&mut self, parts: &[&str], within: Duration) {
        let start = Instant::now();
        loop {
            let text = self.text();
            if parts.iter().all(|part| text.contains(part)) {
                return;
            }
            assert!(
                start.elapsed() < within,
                "{parts:?} not within {within:?} in:\n{text}"
            );
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Shows the page at a width, in the dark or not.
    pub fn resize(&mut self, width: u32, is_dark: bool) {
        let size = json!({
            "width": width,
            "height": 900,
            "deviceScaleFactor": 1,
            "mobile": width < 500,
        });
        self.call("Emulation.setDeviceMetricsOverride", size);
        let scheme = if is_dark { "dark" } else { "light" };
        let media = json!({ "features": [{ "name": "prefers-color-scheme", "value": scheme }] });
        self.call("Emulation.setEmulatedMedia", media);
    }

    /// A picture of the whole page, and whether anything sticks out of it at the side.
    pub fn picture(&mut self, file: &Path) -> Result<(), String> {
        // Two frames: what follows the new width has been laid out.
        self.eval("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))");
        let size = self.eval(
            "[innerWidth, document.documentElement.scrollWidth, document.documentElement.scrollHeight]",
        );
        let [width, wide, high] = [0, 1, 2].map(|place| size[place].as_u64().unwrap());
        let clip = json!({ "x": 0, "y": 0, "width": width, "height": high.min(8_000), "scale": 1 });
        let asked = json!({ "format": "png", "captureBeyondViewport": true, "clip": clip });
        let answer = self.call("Page.captureScreenshot", asked);
        let bytes = STANDARD.decode(answer["data"].as_str().unwrap()).unwrap();
        std::fs::write(file, bytes).unwrap();
        match wide <= width {
            true => Ok(()),
            false => Err(format!("{}: {wide} px wide", file.display())),
        }
    }

    /// What the page complained of since last asked: exceptions, errors and warnings of its console, and what
    /// the browser has to say about it.
    pub fn complaints(&mut self) -> Vec<String> {
        // Whatever was said before this answer has arrived with it.
        self.eval("1");
        let events: Vec<Value> = self.events.drain(..).collect();
        let complaint = |event: &Value| {
            let told = &event["params"];
            match event["method"].as_str()? {
                "Runtime.exceptionThrown" => Some(told.to_string()),
                "Runtime.consoleAPICalled" if told["type"] != "log" => Some(told.to_string()),
                "Log.entryAdded" if told["entry"]["level"] != "verbose" => {
                    Some(told["entry"].to_string())
                }
                _ => None,
            }
        };
        events.iter().filter_map(complaint).collect()
    }

    /// The roles of what a screen reader is told, with their names.
    pub fn spoken(&mut self) -> Vec<(String, String)> {
        let tree = self.call("Accessibility.getFullAXTree", json!({}));
        let nodes = tree["nodes"].as_array().unwrap();
        let text = |value: &Value| value["value"].as_str().unwrap_or_default().to_owned();
        let heard = nodes.iter().filter(|node| node["ignored"] != json!(true));
        heard
            .map(|node| (text(&node["role"]), text(&node["name"])))
            .collect()
    }

    /// Presses a key.
    pub fn press(&mut self, key: &str, code: u32) {
        for kind in ["keyDown", "keyUp"] {
            let pressed =
                json!({ "type": kind, "key": key, "code": key, "windowsVirtualKeyCode": code });
            self.call("Input.dispatchKeyEvent", pressed);
        }
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // It ends once nobody holds the other end of its pipe.
        drop(self.orders.take());
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(5) {
            if let Ok(Some(_)) = self.child.try_wait() {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
