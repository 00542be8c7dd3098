//! The expressions of the dashboard, as Grafana would ask them.

use serde_json::Value;

/// Each panel's title with one of its expressions, for all tables of `group`.
pub fn expressions(group: &str) -> Vec<(String, String)> {
    let dashboard: Value =
        serde_json::from_str(include_str!("../../config/grafana-dashboard.json")).unwrap();
    let panels = dashboard["panels"].as_array().unwrap().iter();
    let mut found = Vec::new();
    for panel in panels.filter(|panel| panel["type"] != "row") {
        let targets = panel["targets"].as_array().unwrap();
        assert!(!targets.is_empty(), "{} asks nothing", panel["title"]);
        for target in targets {
            let expression = target["expr"].as_str().unwrap();
            let expression = expression
                .replace("$__rate_interval", "20s")
                .replace("$group", group)
                .replace("$table", ".*");
            assert!(!expression.contains('$'), "{expression}");
            found.push((panel["title"].as_str().unwrap().to_owned(), expression));
        }
    }
    found
}
