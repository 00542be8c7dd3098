use std::time::Duration;

use super::*;
use crate::config::read::parse;

const GROUP: &str = r#"group = "orders"
active = "us-east-1"
here = "us-west-2"
[regions.us-east-1]
[regions.us-west-2]
[[tables]]
name = "orders"
[dead_letters]
directory = "/var/lib/farshore"
"#;

/// One action of each kind, with no more than it needs.
const EACH: [&str; 6] = [
    "kind = \"file\"\npath = \"/etc/active\"\ncontent = \"{region}\"",
    "kind = \"command\"\ncommand = [\"/bin/true\", \"{region}\"]",
    "kind = \"webhook\"\nurl = \"https://hooks.example.com/a\"",
    "kind = \"ssm_parameter\"\nparameter = \"/a\"\nvalue = \"{region}\"",
    "kind = \"sns\"\ntopic_arn = \"arn:aws:sns:{region}:111122223333:failover\"",
    "kind = \"route53_record\"\nhosted_zone_id = \"Z1\"\nrecord = \"a.example.com\"\nrecord_type = \"CNAME\"\nvalue = \"{region}.example.com\"",
];

fn with(actions: &[&str]) -> String {
    let sections = actions
        .iter()
        .map(|action| format!("[[actions]]\n{action}\n"));
    GROUP.to_owned() + &sections.collect::<String>()
}

fn why(text: &str) -> String {
    let failure = parse("farshore.toml", text, &[]).expect_err("the text should be refused");
    format!("{} / {}", failure.why, failure.next)
}

#[test]
fn each_kind_has_its_defaults_and_a_name_by_its_place() {
    let loaded = parse("farshore.toml", &with(&EACH), &[]).unwrap();
    let actions = loaded.config.actions;
    let names: Vec<&str> = actions.iter().map(|action| action.name.as_str()).collect();
    assert_eq!(
        names,
        [
            "file-1",
            "command-2",
            "webhook-3",
            "ssm_parameter-4",
            "sns-5",
            "route53_record-6"
        ]
    );
    for action in &actions {
        assert!(action.required);
        assert_eq!(
            (action.timeout, action.retries),
            (Duration::from_secs(10), 2)
        );
        assert!(action.name.starts_with(action.kind.name()));
    }
    let Kind::SsmParameter(parameter) = &actions[3].kind else {
        panic!()
    };
    assert_eq!(parameter.region, Template::of_region());
    let Kind::Route53Record(record) = &actions[5].kind else {
        panic!()
    };
    assert_eq!(record.ttl, Duration::from_secs(30));
}

#[test]
fn a_build_that_cannot_call_aws_refuses_an_action_that_does() {
    for (index, action) in EACH.into_iter().enumerate() {
        let written = vec![toml::from_str(action).unwrap()];
        match checked(written, false) {
            Ok(actions) => assert!(index < 3, "{actions:?}"),
            Err(wrong) => {
                assert!(index >= 3, "{wrong}");
                let text = wrong.to_string();
                assert!(text.contains("actions[0].kind: this build"), "{text}");
                assert!(wrong.next.contains("cargo feature `actions`"), "{wrong:?}");
            }
        }
    }
}

/// Without its required keys an action is refused, and the key and the action's line are named.
#[test]
fn what_a_kind_needs_is_missed_by_name() {
    for action in EACH {
        for line in action.lines().skip(1) {
            let text = why(&with(&[EACH[0], &action.replace(line, "")]));
            let field = line.split(' ').next().unwrap();
            let names = format!("actions[1].{field}: it is missing");
            assert!(text.contains(&names), "{action}: {text}");
            assert!(text.starts_with("line 14, "), "{text}");
        }
    }
}

#[test]
fn what_is_wrong_in_an_action_names_its_field_and_line() {
    let file = EACH[0];
    let command = EACH[1];
    let webhook = EACH[2];
    for (action, more, names) in [
        (
            file,
            "content = \"{regoin}\"",
            "line 13, actions[].content: there is no placeholder `{regoin}`: did you mean `{region}`",
        ),
        (
            file,
            "knid = 1",
            "line 14: there is no key `actions[].knid` / Did you mean `actions[].kind`",
        ),
        (file, "timeout = 3", "line 14, actions[].timeout"),
        (
            file,
            "timeout = \"1ms\"",
            "line 14, actions[0].timeout: 1ms is out of bounds",
        ),
        (file, "retries = -1", "line 14, actions[].retries"),
        (
            file,
            "retries = 101",
            "line 14, actions[0].retries: 101 is out of bounds",
        ),
        (file, "required = \"no\"", "line 14, actions[].required"),
        (file, "name = \"\"", "line 14, actions[0].name: it is empty"),
        (
            file,
            "url = \"http://x\"",
            "line 14, actions[0].url: an action of the kind `file` has no such key",
        ),
        (
            file,
            "path = \"active\"",
            "line 12, actions[0].path: `active` depends on where",
        ),
        (
            file,
            "pid_file = \"run/pid\"",
            "line 14, actions[0].pid_file: `run/pid` depends",
        ),
        (
            file,
            "signal = \"HUP\"",
            "line 14, actions[0].signal: there is no pid_file",
        ),
        (
            file,
            "pid_file = \"/run/pid\"\nsignal = \"KILL\"",
            "line 15, actions[].signal: unknown variant `KILL`",
        ),
        (
            file,
            "kind = \"fiel\"",
            "line 11, actions[].kind: unknown variant `fiel`",
        ),
        (
            command,
            "command = []",
            "line 12, actions[0].command: it is empty",
        ),
        (command, "command = \"true\"", "line 12, actions[].command"),
        (
            command,
            "command = [\"{region}\"]",
            "actions[0].command: its first part is no fixed program",
        ),
        (
            command,
            "command = [\"x\", \"{nope}\"]",
            "line 12, actions[].command: there is no placeholder `{nope}`",
        ),
        (
            webhook,
            "url = \"ftp://x\"",
            "line 12, actions[0].url: it is no http or https URL",
        ),
        (
            webhook,
            "url = \"https://user:pass@x\"",
            "line 12, actions[0].url: it holds a name or password",
        ),
        (
            webhook,
            "body = '{\"a\": {region}}'",
            "line 13, actions[0].body: it is no JSON",
        ),
        (
            webhook,
            "secret_env = \"\"",
            "line 13, actions[0].secret_env: it is no name",
        ),
        (
            webhook,
            "secret_env = \"A\"\nsecret_file = \"/a\"",
            "line 14, actions[0].secret_file: secret_env is set, too",
        ),
    ] {
        // A key that is there already is replaced.
        let key = more.split(' ').next().unwrap();
        let mut lines: Vec<&str> = action.lines().collect();
        match lines
            .iter()
            .position(|line| line.starts_with(&format!("{key} ")))
        {
            Some(at) => lines[at] = more,
            None => lines.push(more),
        }
        let text = why(&with(&[&lines.join("\n")]));
        assert!(text.contains(names), "{more}: {text}");
        assert!(!text.contains("pass@"), "{text}");
    }
    let text = why(&with(&["name = \"x\"\npath = \"/a\""]));
    assert!(
        text.contains("missing field `kind`") && text.contains("line 10"),
        "{text}"
    );
    let twice = format!("{file}\nname = \"command-1\"");
    let text = why(&with(&[&twice.replace("command-1", "command-2"), command]));
    assert!(
        text.contains("actions[1].name: `command-2` stands twice"),
        "{text}"
    );
    let text = why(&with(&vec![command; 101]));
    assert!(text.contains("more than 100 actions"), "{text}");
}

#[test]
fn what_is_wrong_in_an_action_that_calls_aws_names_its_field_and_line() {
    let [.., parameter, topic, record] = EACH;
    for (action, more, names) in [
        (
            parameter,
            "region = \"mars\"",
            "line 14, actions[0].region: `mars` is none of the regions",
        ),
        (
            parameter,
            "value = \"\"",
            "line 13, actions[0].value: it is empty",
        ),
        (
            parameter,
            "endpoint_url = \"ssm\"",
            "line 14, actions[0].endpoint_url: `ssm` is no http",
        ),
        (
            topic,
            "topic_arn = \"failover\"",
            "line 12, actions[0].topic_arn: it is no ARN",
        ),
        (
            topic,
            "message = \"\"",
            "line 13, actions[0].message: it is empty",
        ),
        (
            record,
            "hosted_zone_id = \"/hostedzone/Z1\"",
            "line 12, actions[0].hosted_zone_id",
        ),
        (
            record,
            "record_type = \"MX\"",
            "line 14, actions[].record_type: unknown variant `MX`",
        ),
        (
            record,
            "ttl = \"2days\"",
            "line 16, actions[0].ttl: 2days is out of bounds",
        ),
        (record, "ttl = \"1500ms\"", "line 16, actions[0].ttl"),
    ] {
        let key = more.split(' ').next().unwrap();
        let mut lines: Vec<&str> = action.lines().collect();
        match lines
            .iter()
            .position(|line| line.starts_with(&format!("{key} ")))
        {
            Some(at) => lines[at] = more,
            None => lines.push(more),
        }
        let text = why(&with(&[&lines.join("\n")]));
        assert!(text.contains(names), "{more}: {text}");
    }
}

/// The actions that `config/default.toml` shows as comments are right as they stand.
#[test]
fn the_actions_of_the_default_file_are_right() {
    let text = include_str!("../../../config/default.toml");
    let (used, shown) = text.split_once("# [[actions]]").unwrap();
    let shown = format!("# [[actions]]{shown}");
    let shown = shown
        .lines()
        .map(|line| line.strip_prefix("# ").unwrap_or(""));
    let text = format!("{used}{}", shown.collect::<Vec<_>>().join("\n"));
    let actions = parse("farshore.toml", &text, &[]).unwrap().config.actions;
    let kinds: Vec<&str> = actions.iter().map(|action| action.kind.name()).collect();
    assert_eq!(
        kinds,
        [
            "file",
            "command",
            "webhook",
            "ssm_parameter",
            "sns",
            "route53_record"
        ]
    );
}

/// Every example of `docs/ACTIONS.md` is right as it stands, and there is one of each kind.
#[test]
fn the_examples_of_the_page_are_right() {
    let page = include_str!("../../../docs/ACTIONS.md");
    let examples = page.split("```toml\n").skip(1);
    let examples = examples.map(|rest| rest.split("```").next().unwrap());
    let text = GROUP.to_owned() + &examples.collect::<String>();
    let actions = parse("farshore.toml", &text, &[]).unwrap().config.actions;
    let kinds: Vec<&str> = actions.iter().map(|action| action.kind.name()).collect();
    assert_eq!(
        kinds,
        [
            "file",
            "command",
            "webhook",
            "ssm_parameter",
            "sns",
            "route53_record"
        ]
    );
}
