//! `docs/SEMANTICS.md` names a test for each promise: every one of them must be there.

use std::path::Path;

fn sources(folder: &Path, text: &mut String) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, text);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            text.push_str(&std::fs::read_to_string(&path).unwrap());
        }
    }
}

#[test]
fn every_promise_names_tests_that_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut code = String::new();
    sources(&root.join("src"), &mut code);
    sources(&root.join("tests"), &mut code);
    let page = include_str!("../docs/SEMANTICS.md");
    let mut promises = 0;
    for section in page.split("\n## ").skip(1) {
        let (_, tests) = section
            .split_once("Tests:")
            .unwrap_or_else(|| panic!("no test for {section}"));
        let names: Vec<&str> = tests.split('`').skip(1).step_by(2).collect();
        assert!(!names.is_empty(), "{section}");
        for name in names {
            assert!(
                code.contains(&format!("fn {name}(")),
                "docs/SEMANTICS.md names the test {name}, which does not exist"
            );
        }
        promises += 1;
    }
    assert_eq!(promises, 12);
}
