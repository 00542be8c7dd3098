"""Checks dead letters against docs/DEAD_LETTER.schema.json, as somebody would who reads them without
Farshore. A JSON array of letters comes on stdin; the answer is how many were checked."""

import base64
import gzip
import json
import pathlib
import sys

import fastjsonschema

SCHEMA = pathlib.Path(__file__).parents[2] / "docs" / "DEAD_LETTER.schema.json"


def main() -> int:
    validate = fastjsonschema.compile(json.loads(SCHEMA.read_text()))
    letters = json.load(sys.stdin)
    for letter in letters:
        validate(letter)
        # What was compressed is an image like any other.
        images = {
            name: json.loads(gzip.decompress(base64.b64decode(packed, validate=True)))
            for name, packed in letter.pop("compressed", {}).items()
        }
        validate(letter | images)
    # A check that lets everything through is none.
    for broken in ({}, letters[0] | {"version": 2}, letters[0] | {"more": 1}):
        try:
            validate(broken)
        except fastjsonschema.JsonSchemaValueException:
            continue
        print(json.dumps({"error": f"{broken} was let through"}))
        return 1
    print(json.dumps({"checked": len(letters)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
