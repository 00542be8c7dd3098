//! Every configuration key once: its dotted path, type, default and the reason for the default.
//! Unknown keys, `FARSHORE_…` variables, `docs/CONFIGURATION.md` and `config/default.toml` are
//! all held against this list.

/// One configuration key.
#[derive(Debug, Clone, Copy)]
pub struct Key {
    /// Dotted path; `*` stands for a region's label, `[]` for an entry of a list.
    pub path: &'static str,
    /// Type, as the documentation names it.
    pub kind: &'static str,
    /// Default as it is written in a file; empty where there is none.
    pub default: &'static str,
    /// What it does, and why the default is what it is.
    pub reason: &'static str,
}

const fn key(
    path: &'static str,
    kind: &'static str,
    default: &'static str,
    reason: &'static str,
) -> Key {
    Key {
        path,
        kind,
        default,
        reason,
    }
}

/// All keys, in the order in which a file reads best.
pub const KEYS: &[Key] = &[
    key(
        "group",
        "string",
        "",
        "Names the group of tables that fail over together. Required: it is part of the state table's name.",
    ),
    key(
        "active",
        "label",
        "",
        "The active region until a control record exists; afterwards the record decides. Required.",
    ),
    key(
        "here",
        "label",
        "AWS_REGION",
        "The region this process feeds, as a label or an AWS region name. The environment knows it, so one file serves all regions.",
    ),
    key(
        "regions.*.region",
        "string",
        "the label",
        "AWS region name.",
    ),
    key(
        "regions.*.endpoint_url",
        "URL",
        "",
        "Endpoint of DynamoDB and its streams; `embedded` starts one inside the process. AWS's own by default.",
    ),
    key(
        "regions.*.streams_endpoint_url",
        "URL",
        "",
        "Endpoint of the streams where it differs: PrivateLink has no private DNS for them.",
    ),
    key(
        "regions.*.profile",
        "string",
        "",
        "Profile of the shared credentials file. The SDK's chain by default.",
    ),
    key(
        "regions.*.role_arn",
        "ARN",
        "",
        "Role to assume for this region, for a copy in another account.",
    ),
    key(
        "regions.*.external_id",
        "string",
        "",
        "External id presented when assuming the role.",
    ),
    key(
        "tables[].name",
        "string",
        "",
        "The table, by its name in every region that `names` does not list. Required.",
    ),
    key(
        "tables[].names.*",
        "string",
        "",
        "The table's name in single regions, by label.",
    ),
    key(
        "tables[].start",
        "\"trim-horizon\" \\| \"latest\" \\| time",
        "\"trim-horizon\"",
        "Where the first run starts. The oldest record: a copy that starts too early is right, one that starts too late is not.",
    ),
    key(
        "tables[].bootstrap",
        "boolean",
        "true",
        "Whether the first run copies what the source table already holds. Otherwise, where it holds anything, a gap `never-copied` stays open until a `reconcile --apply` closes it.",
    ),
    key(
        "tables[].ttl_deletes",
        "\"replicate\" \\| \"skip\"",
        "\"replicate\"",
        "What happens to deletes made by TTL. Replicated: TTL is off on replicas, so nothing else removes these items.",
    ),
    key(
        "tables[].units_per_second",
        "number",
        "",
        "Overrides `writes.units_per_second` for this table.",
    ),
    key(
        "tables[].coalesce",
        "boolean",
        "",
        "Overrides `writes.coalesce` for this table.",
    ),
    key(
        "worker.listen",
        "address",
        "\"127.0.0.1:9464\"",
        "Address of metrics and health. Loopback: metrics name tables; who wants them outside says so (the container image does).",
    ),
    key(
        "worker.poll_interval",
        "duration",
        "\"250ms\"",
        "Pause between reads of a shard while records come; after a full page it reads on at once. Lambda polls at this rate.",
    ),
    key(
        "worker.idle_interval",
        "duration",
        "\"1s\"",
        "Longest pause between reads of an idle shard. GetRecords is billed by the call.",
    ),
    key(
        "worker.concurrency",
        "number",
        "32",
        "Batches in flight per shard, at most. Thirty-two of 25 catch up with 8,000 writes/s over 100 ms of distance; a worker with many shards at work gives each fewer.",
    ),
    key(
        "worker.read_ahead",
        "size",
        "\"64 MiB\"",
        "Bytes of records that the worker holds ahead of what is durable. Shards at work share it, up to 8 MiB each; half of a share is one page.",
    ),
    key(
        "worker.checkpoint_every",
        "duration",
        "\"1s\"",
        "Least time between checkpoints of a shard: what a crash replays. Each is one conditional write.",
    ),
    key(
        "worker.discover_every",
        "duration",
        "\"30s\"",
        "Time between complete listings of a stream, over the whole fleet. Children are asked for when their parent ends; this finds what that missed.",
    ),
    key(
        "worker.shutdown_grace",
        "duration",
        "\"25s\"",
        "Time to drain after SIGTERM or Ctrl-C. ECS and Kubernetes kill after 30 s.",
    ),
    key(
        "leases.table",
        "string",
        "farshore-<group>",
        "Name of the state table.",
    ),
    key(
        "leases.duration",
        "duration",
        "\"10s\"",
        "How long a lease outlives its last renewal. A dead worker's shards wait this long; two renewals may fail before it.",
    ),
    key(
        "leases.late_effect",
        "duration",
        "\"6m\"",
        "How long a write that got no answer may still take effect. What it wrote is repaired afterwards. A signed request is refused some five minutes after its date.",
    ),
    key(
        "writes.units_per_second",
        "number",
        "4000",
        "Write units per second and table, for the whole fleet and its jobs together; 0 means no limit. What a new on-demand table takes without throttling.",
    ),
    key(
        "writes.adaptive",
        "boolean",
        "true",
        "Whether throttling slows the writes: to 70 % at each sign of it, back by a tenth a second. A throttled range of keys, or a part of a batch sent back, slows its shard alone. What is refused was sent in vain.",
    ),
    key(
        "writes.coalesce",
        "boolean",
        "true",
        "Of several changes of one item that wait together only the last is written. The replica ends the same and costs less.",
    ),
    key(
        "dead_letters.queue_url",
        "URL",
        "",
        "SQS queue in the replica region for records the replica can never take. This or `directory` is required. Its MaximumMessageSize is read at the start: 1 MiB holds most images, under 32 KiB it is refused.",
    ),
    key(
        "dead_letters.endpoint_url",
        "URL",
        "",
        "Endpoint of SQS. The origin of `queue_url` by default.",
    ),
    key(
        "dead_letters.directory",
        "path",
        "",
        "A directory of JSON lines instead of a queue, for one host.",
    ),
    key(
        "dead_letters.max_attempts",
        "number",
        "3",
        "How often a record is tried alone before it counts as poison. A refusal of the data does not pass by itself; more tries rule out a schema change under way.",
    ),
    key(
        "dead_letters.halt_after",
        "number",
        "1000",
        "More records of a table refused within a minute close its tap, and so do more than half of at least 100 records: then the schemas have diverged, and no record is to blame. 0 turns both off. Counted in each worker.",
    ),
    key(
        "reconcile.read_units_per_second",
        "number",
        "500",
        "Read units per second that `reconcile`, the first copy of a table and the repair of gaps spend on each side, the whole fleet together; 0 means no limit. A sixth of what one partition gives: the application keeps the rest.",
    ),
    key(
        "reconcile.segments",
        "number",
        "0",
        "Parts that each table is read in. 0 chooses by the table's size.",
    ),
    key(
        "reconcile.memory",
        "size",
        "\"256 MB\"",
        "Memory for items that wait for their partners. Where both tables come in the same order a few pages wait; where not, and this is full, those that have waited longest are looked up.",
    ),
    key(
        "reconcile.settle",
        "duration",
        "\"5s\"",
        "How long a suspect is looked at before it counts as a difference, where a worker applies changes. Longer than the worker is behind.",
    ),
    key(
        "reconcile.max_deletes",
        "number or part",
        "\"1%\"",
        "More items that only the target has are not deleted: the job ends before the first. A part is one of the target's items, and at least 10.",
    ),
    key(
        "reconcile.on_gap",
        "\"repair\" \\| \"report\" \\| \"off\"",
        "\"repair\"",
        "What the worker does about a gap: compares the table and makes it as the source is, says how many items differ, or nothing. A gap shows in any case. Repaired: nobody is awake to do it.",
    ),
    key(
        "audit.read_units_per_second",
        "number",
        "0",
        "Read units per second that `run` spends on each side to compare each table with its replica, for ever, one worker of the fleet at a time. 0 turns it off.",
    ),
    key(
        "actions[].kind",
        "\"file\" \\| \"command\" \\| \"webhook\" \\| \"ssm_parameter\" \\| \"sns\" \\| \"route53_record\"",
        "",
        "What is done after the fence of a failover, one action after another, as they stand here. Required; docs/ACTIONS.md shows each kind with its keys. Those that call AWS need the cargo feature `actions`, which is on by default.",
    ),
    key(
        "actions[].name",
        "string",
        "kind and position",
        "What plan and report call it. What is done already is remembered by it, so name an action whose place may change between two attempts.",
    ),
    key(
        "actions[].required",
        "boolean",
        "true",
        "Whether a failover stops where it fails, so that the same command goes on there. What follows may rely on it; a mere notification says false.",
    ),
    key(
        "actions[].timeout",
        "duration",
        "\"10s\"",
        "How long one attempt may take. What a command started is killed then.",
    ),
    key(
        "actions[].retries",
        "number",
        "2",
        "Attempts after the first, with pauses of at most 2 s. What cannot pass by itself, like a missing permission, is not tried again.",
    ),
    key(
        "actions[].path",
        "path",
        "",
        "`file`: where it is. What is there is replaced in one step, mode and owner kept. Required.",
    ),
    key(
        "actions[].content",
        "template",
        "",
        "`file`: what it holds. Required.",
    ),
    key(
        "actions[].pid_file",
        "path",
        "",
        "`file`: holds the id of the process to signal afterwards.",
    ),
    key(
        "actions[].signal",
        "\"HUP\" \\| \"USR1\" \\| \"USR2\" \\| \"TERM\"",
        "\"HUP\"",
        "`file`: what that process gets. Most read their files again at HUP.",
    ),
    key(
        "actions[].command",
        "list of templates",
        "",
        "`command`: a program and its arguments, without a shell. Required.",
    ),
    key(
        "actions[].url",
        "URL",
        "",
        "`webhook`: where to post. Required.",
    ),
    key(
        "actions[].body",
        "template",
        "JSON with every placeholder",
        "`webhook`: the JSON to post. Values are escaped for it.",
    ),
    key(
        "actions[].secret_env",
        "string",
        "",
        "`webhook`: the environment variable with the secret that signs it. Not signed without this or `secret_file`.",
    ),
    key(
        "actions[].secret_file",
        "path",
        "",
        "`webhook`: the file with that secret.",
    ),
    key(
        "actions[].parameter",
        "template",
        "",
        "`ssm_parameter`: its name. Required.",
    ),
    key(
        "actions[].value",
        "template",
        "",
        "`ssm_parameter`, `route53_record`: the value. Required.",
    ),
    key(
        "actions[].region",
        "template",
        "\"{region}\"",
        "`ssm_parameter`: label of the region it lies in. The region that is active now: the other one may not answer.",
    ),
    key(
        "actions[].topic_arn",
        "template",
        "",
        "`sns`: the topic, whose ARN also says in which region. Required.",
    ),
    key(
        "actions[].subject",
        "template",
        "",
        "`sns`: subject of mails.",
    ),
    key(
        "actions[].message",
        "template",
        "one sentence",
        "`sns`: the message.",
    ),
    key(
        "actions[].hosted_zone_id",
        "string",
        "",
        "`route53_record`: the zone. Required.",
    ),
    key(
        "actions[].record",
        "template",
        "",
        "`route53_record`: name of the record. Required.",
    ),
    key(
        "actions[].record_type",
        "\"A\" \\| \"AAAA\" \\| \"CNAME\"",
        "",
        "`route53_record`: its type. Required.",
    ),
    key(
        "actions[].ttl",
        "duration",
        "\"30s\"",
        "`route53_record`: how long resolvers may keep it. Traffic moves no sooner.",
    ),
    key(
        "actions[].endpoint_url",
        "URL",
        "",
        "`ssm_parameter`, `sns`, `route53_record`: endpoint of the service. AWS's own by default.",
    ),
];

/// Whether the concrete dotted `path` (labels and list indexes filled in) fits the pattern of a
/// key.
pub fn matches(pattern: &str, path: &[&str]) -> bool {
    let expected: Vec<&str> = segments(pattern);
    expected.len() == path.len()
        && expected
            .iter()
            .zip(path)
            .all(|(want, have)| *want == "*" || want == have)
}

/// Whether `path` is a table that holds keys rather than a key.
pub fn is_section(path: &[&str]) -> bool {
    KEYS.iter().any(|key| {
        let expected = segments(key.path);
        expected.len() > path.len()
            && expected
                .iter()
                .zip(path)
                .all(|(want, have)| *want == "*" || want == have)
    })
}

/// The pattern's parts; a list entry is a part `[]` of its own.
fn segments(pattern: &str) -> Vec<&str> {
    pattern
        .split('.')
        .flat_map(|part| match part.strip_suffix("[]") {
            Some(name) => vec![name, "[]"],
            None => vec![part],
        })
        .collect()
}

/// The known key nearest to a mistyped `path`, filled with the path's own labels.
pub fn nearest(path: &[&str]) -> Option<String> {
    let wanted = path.join(".");
    KEYS.iter()
        .map(|key| {
            let mut parts = segments(key.path);
            for (part, have) in parts.iter_mut().zip(path) {
                if *part == "*" {
                    *part = have;
                }
            }
            parts.join(".")
        })
        .map(|candidate| (strsim::damerau_levenshtein(&candidate, &wanted), candidate))
        .filter(|(distance, _)| *distance <= 2 + wanted.len() / 4)
        .min()
        .map(|(_, candidate)| display(&candidate.split('.').collect::<Vec<_>>()))
}

/// A path for people: list entries as `tables[]`.
pub fn display(path: &[&str]) -> String {
    path.join(".").replace(".[]", "[]")
}
