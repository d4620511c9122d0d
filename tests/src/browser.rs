//! A real Chromium, driven by its DevTools protocol over a pipe: JSON that ends in a zero byte, on the file handles 3 and 4.
//!
//! Input: addresses and expressions. Output: what the page says, every request that it made, every error that it had, and pictures.
//! Nothing is asked again and again: a wait is a promise in the page that a change of it resolves.

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

/// For what is not measured.
const PATIENCE: Duration = Duration::from_secs(60);
/// The handles 3 and 4 are those that this process has as the standard ones.
const ON_PIPES: &str = r#"exec "$@" 3<&0 4>&1 </dev/null >/dev/null 2>&1"#;
const FLAGS: [&str; 13] = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--no-proxy-server",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
    "--remote-debugging-pipe",
];

/// A browser with one page.
pub struct Browser {
    process: Child,
    commands: ChildStdin,
    answers: Receiver<Value>,
    next: u64,
    session: Value,
    told: Vec<Value>,
    _profile: TempDir,
}

/// The size of a window, and whether it is that of a phone.
#[derive(Clone, Copy, Debug)]
pub struct Window {
    pub width: u32,
    pub height: u32,
    pub phone: bool,
}

impl Browser {
    /// # Panics
    /// If Chromium is not there or does not start.
    #[must_use]
    pub fn start() -> Self {
        let profile = tempfile::tempdir().expect("a temporary directory");
        let mut command = Command::new("sh");
        command.args(["-c", ON_PIPES, "sh", "chromium"]).args(FLAGS).arg("about:blank");
        command.arg(format!("--user-data-dir={}", profile.path().display()));
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut process = command.spawn().expect("sh starts");
        let commands = process.stdin.take().expect("it is piped");
        let mut lines = BufReader::new(process.stdout.take().expect("it is piped"));
        let (sender, answers) = channel();
        std::thread::spawn(move || {
            let mut message = Vec::new();
            while lines.read_until(0, &mut message).is_ok_and(|read| read > 0) {
                message.pop();
                let parsed = serde_json::from_slice::<Value>(&message).unwrap_or_else(|error| panic!("{error}"));
                message.clear();
                if sender.send(parsed).is_err() {
                    break;
                }
            }
        });
        let mut browser =
            Self { process, commands, answers, next: 0, session: Value::Null, told: Vec::new(), _profile: profile };
        let target = browser.call("Target.createTarget", json!({ "url": "about:blank" }))["targetId"].clone();
        let attached = browser.call("Target.attachToTarget", json!({ "targetId": target, "flatten": true }));
        browser.session = attached["sessionId"].clone();
        for domain in ["Page", "Runtime", "Log", "Network", "Accessibility"] {
            browser.call(&format!("{domain}.enable"), json!({}));
        }
        browser
    }

    /// One command of the protocol.
    ///
    /// # Panics
    /// If it fails, or there is no answer for long.
    pub fn call(&mut self, method: &str, parameters: Value) -> Value {
        self.within(PATIENCE, method, parameters).unwrap_or_else(|| panic!("{method} has no answer"))
    }

    fn within(&mut self, limit: Duration, method: &str, parameters: Value) -> Option<Value> {
        self.next += 1;
        let mut command = json!({ "id": self.next, "method": method, "params": parameters });
        if !self.session.is_null() {
            command["sessionId"] = self.session.clone();
        }
        self.commands.write_all(format!("{command}\0").as_bytes()).expect("the browser listens");
        let started = Instant::now();
        loop {
            match self.answers.recv_timeout(limit.saturating_sub(started.elapsed())) {
                // the page was left while it was asked: the next one is asked
                Ok(answer) if answer["id"] == self.next && left(&answer["error"]) => {
                    return self.within(limit.saturating_sub(started.elapsed()), method, parameters);
                }
                Ok(answer) if answer["id"] == self.next => {
                    assert!(answer["error"].is_null(), "{method}: {}", answer["error"]);
                    return Some(answer["result"].clone());
                }
                // of a wait that was given up
                Ok(answer) if !answer["id"].is_null() => {}
                Ok(event) => self.told.push(event),
                Err(RecvTimeoutError::Timeout) => return None,
                Err(RecvTimeoutError::Disconnected) => panic!("the browser has ended before it answered {method}"),
            }
        }
    }

    /// Goes to an address, and forgets what was told before.
    pub fn open(&mut self, address: &str) {
        self.told.clear();
        let opened = self.call("Page.navigate", json!({ "url": address }));
        assert!(
            opened["errorText"].is_null() || opened["errorText"] == "net::ERR_HTTP_RESPONSE_CODE_FAILURE",
            "{opened}"
        );
    }

    /// The value of an expression in the page.
    pub fn value(&mut self, expression: &str) -> Value {
        let asked = json!({ "expression": expression, "awaitPromise": true, "returnByValue": true });
        let answer = self.call("Runtime.evaluate", asked);
        assert!(answer["exceptionDetails"].is_null(), "{expression}: {}", answer["exceptionDetails"]);
        answer["result"]["value"].clone()
    }

    /// Waits until an expression is true in the page; how long that took.
    ///
    /// # Panics
    /// If it is not within `limit`.
    pub fn until(&mut self, expression: &str, limit: Duration) -> Duration {
        let started = Instant::now();
        let promise = format!(
            "new Promise((done) => {{
               const watch = new MutationObserver(() => look());
               const look = () => {{ if ({expression}) {{ watch.disconnect(); done(true); }} }};
               watch.observe(document, {{ subtree: true, childList: true, attributes: true, characterData: true }});
               look();
             }})"
        );
        let asked = json!({ "expression": promise, "awaitPromise": true, "returnByValue": true });
        match self.within(limit, "Runtime.evaluate", asked) {
            Some(answer) => assert_eq!(answer["result"]["value"], true, "{expression}: {answer}"),
            None => {
                let seen = self.value("document.body.innerText");
                panic!("not within {limit:?}: {expression}; the page says {seen}\n{:#?}", self.errors());
            }
        }
        started.elapsed()
    }

    /// As a person with such a screen sees it.
    pub fn resize(&mut self, window: Window) {
        let Window { width, height, phone } = window;
        let size = json!({ "width": width, "height": height, "deviceScaleFactor": 1, "mobile": phone });
        self.call("Emulation.setDeviceMetricsOverride", size);
    }

    /// `light` or `dark`.
    pub fn prefer(&mut self, scheme: &str) {
        let feature = json!([{ "name": "prefers-color-scheme", "value": scheme }]);
        self.call("Emulation.setEmulatedMedia", json!({ "features": feature }));
    }

    /// Presses a key that has no character.
    pub fn press(&mut self, key: &str) {
        for kind in ["rawKeyDown", "keyUp"] {
            self.call("Input.dispatchKeyEvent", json!({ "type": kind, "key": key, "code": key }));
        }
    }

    /// The window as a PNG.
    ///
    /// # Panics
    /// If the browser draws none.
    pub fn picture(&mut self) -> Vec<u8> {
        let answer = self.call("Page.captureScreenshot", json!({ "format": "png", "optimizeForSpeed": false }));
        decoded(answer["data"].as_str().expect("a picture"))
    }

    /// Names and roles of what a person can operate, as a screen reader is told.
    pub fn controls(&mut self) -> Vec<(String, String)> {
        let tree = self.call("Accessibility.getFullAXTree", json!({}));
        let operable = ["button", "combobox", "checkbox", "radio", "searchbox", "textbox", "link", "image", "img"];
        let nodes = tree["nodes"].as_array().expect("a tree").iter().filter(|node| node["ignored"] == false);
        let texts = nodes.map(|node| {
            let text = |field: &str| node[field]["value"].as_str().unwrap_or_default().to_owned();
            (text("role"), text("name"))
        });
        texts.filter(|(role, _)| operable.contains(&role.as_str())).collect()
    }

    /// Everything that went wrong since the page was opened: exceptions, errors and warnings on the console, and in the
    /// browser's own log (a broken policy, an answer that is an error).
    #[must_use]
    pub fn errors(&self) -> Vec<&Value> {
        let bad = |event: &&Value| match event["method"].as_str().unwrap_or_default() {
            "Runtime.exceptionThrown" => true,
            "Runtime.consoleAPICalled" => {
                matches!(event["params"]["type"].as_str(), Some("error" | "warning" | "assert"))
            }
            "Log.entryAdded" => matches!(event["params"]["entry"]["level"].as_str(), Some("error" | "warning")),
            _ => false,
        };
        self.told.iter().filter(bad).collect()
    }

    /// Addresses that were asked for since the page was opened.
    #[must_use]
    pub fn requests(&self) -> Vec<String> {
        let asked = self.told.iter().filter(|event| event["method"] == "Network.requestWillBeSent");
        asked.map(|event| event["params"]["request"]["url"].as_str().unwrap_or_default().to_owned()).collect()
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // it may have ended by itself
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// An error says that there is another page now.
fn left(error: &Value) -> bool {
    let message = error["message"].as_str().unwrap_or_default();
    ["target navigated", "context was destroyed", "Cannot find"].iter().any(|part| message.contains(part))
}

/// Base64 of the protocol, which has no line breaks.
fn decoded(text: &str) -> Vec<u8> {
    let six = |byte: u8| match byte {
        b'A'..=b'Z' => u32::from(byte - b'A'),
        b'a'..=b'z' => u32::from(byte - b'a') + 26,
        b'0'..=b'9' => u32::from(byte - b'0') + 52,
        b'+' => 62,
        _ => 63,
    };
    let text = text.trim_end_matches('=').as_bytes();
    let group = |four: &[u8]| {
        let bits = four.iter().fold(0, |bits, &byte| bits << 6 | six(byte)) << (6 * (4 - four.len()));
        let [_, bytes @ ..] = bits.to_be_bytes();
        bytes[..four.len() * 3 / 4].to_vec()
    };
    text.chunks(4).flat_map(group).collect()
}

#[cfg(test)]
mod tests {
    #[test]
    fn base64_is_read() {
        for (text, bytes) in
            [("", &b""[..]), ("TQ==", b"M"), ("TWE=", b"Ma"), ("TWFu", b"Man"), ("+/8A", b"\xfb\xff\0")]
        {
            assert_eq!(super::decoded(text), bytes, "{text}");
        }
    }
}
