"""Compares two tables item by item with boto3.

    python compare.py SOURCE_URL SOURCE_REGION TARGET_URL TARGET_REGION TABLE SECONDS

Reads both completely and consistently, again and again until they are equal or SECONDS have gone.
Prints what it found as JSON. Exit code 0 if they are equal, 1 with the first differing keys if not.
"""

import json
import sys
import time

import boto3
from botocore.config import Config

PAUSE_SECONDS = 0.3
# Differing keys that are named.
NAMED_MAX = 10


def client(endpoint, region):
    return boto3.client(
        "dynamodb",
        endpoint_url=endpoint,
        region_name=region,
        aws_access_key_id="test",
        aws_secret_access_key="test",
        config=Config(retries={"mode": "standard", "total_max_attempts": 5}, read_timeout=20),
    )


def plain(value):
    """A value in a form that is equal where the values are: sets have no order, all else has."""
    ((kind, content),) = value.items()
    if kind in ("SS", "NS", "BS"):
        return kind, sorted(content)
    if kind == "L":
        return kind, [plain(part) for part in content]
    if kind == "M":
        return kind, {name: plain(part) for name, part in content.items()}
    return kind, content


def items(dynamo, table):
    described = dynamo.describe_table(TableName=table)["Table"]
    names = [part["AttributeName"] for part in described["KeySchema"]]
    found = {}
    for page in dynamo.get_paginator("scan").paginate(TableName=table, ConsistentRead=True):
        for item in page["Items"]:
            key = repr([plain(item[name]) for name in names])
            if key in found:
                raise ValueError(f"the scan of {table} gave {key} twice")
            found[key] = {name: plain(value) for name, value in item.items()}
    return found


def main(source_url, source_region, target_url, target_region, table, seconds):
    source, target = client(source_url, source_region), client(target_url, target_region)
    start = time.monotonic()
    while True:
        left, right = items(source, table), items(target, table)
        missing = sorted(left.keys() - right.keys())
        extra = sorted(right.keys() - left.keys())
        different = sorted(key for key in left.keys() & right.keys() if left[key] != right[key])
        equal = not (missing or extra or different)
        waited = time.monotonic() - start
        if equal or waited > float(seconds):
            break
        time.sleep(PAUSE_SECONDS)
    told = {
        "equal": equal,
        "source_items": len(left),
        "target_items": len(right),
        "missing": len(missing),
        "extra": len(extra),
        "different": len(different),
        "examples": (missing + extra + different)[:NAMED_MAX],
        "waited_seconds": round(waited, 1),
        "boto3": boto3.__version__,
    }
    print(json.dumps(told))
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
