use super::*;

/// The example is the documented form: what is read from it and written again is the same, so that no
/// field of it is unknown, none is missing, and none changes its name unnoticed.
#[test]
fn the_example_is_the_shape_that_is_answered() {
    let example = include_str!("../../tests/view/status.json");
    let view: View = serde_json::from_str(example).unwrap();
    assert_eq!(view.version, VERSION);
    let again = serde_json::to_value(&view).unwrap();
    let example: serde_json::Value = serde_json::from_str(example).unwrap();
    assert_eq!(again, example);
}
