"""Walks the stream of a table with boto3, parents before children, and compares what it found.

    python gateway_walk.py ENDPOINT_URL TABLE EXPECTED_JSON

EXPECTED_JSON is a file: {"partition key": [1, 2, null, ...], ...}, the versions each key had, null
for its deletion. Prints what it did as JSON. Exit code 0 if every change was found once and in
order, 1 with the differences on stderr if not.
"""

import json
import sys
import time

import boto3
from botocore.config import Config

PATIENCE_SECONDS = 60
# Rounds without a new record after the last one that was expected: there must be no more.
ROUNDS_AFTER = 3


def listing(streams, arn):
    """All shards of a stream, page by page."""
    shards, more = [], {}
    while True:
        description = streams.describe_stream(StreamArn=arn, **more)["StreamDescription"]
        shards += description["Shards"]
        last = description.get("LastEvaluatedShardId")
        if not last:
            return shards
        more = {"ExclusiveStartShardId": last}


def children(streams, arn, parent):
    shard_filter = {"Type": "CHILD_SHARDS", "ShardId": parent}
    description = streams.describe_stream(StreamArn=arn, ShardFilter=shard_filter)
    return description["StreamDescription"]["Shards"]


def version(image):
    return None if image is None else int(image["v"]["N"])


class Walk:
    def __init__(self, streams, arn):
        self.streams, self.arn = streams, arn
        self.shards, self.iterators, self.finished = {}, {}, set()
        self.history, self.last_number, self.records, self.faults = {}, {}, 0, []

    def round(self):
        for shard in listing(self.streams, self.arn):
            self.shards[shard["ShardId"]] = shard
        for shard_id in sorted(self.shards):
            parent = self.shards[shard_id].get("ParentShardId")
            waits = parent in self.shards and parent not in self.finished
            if not waits and shard_id not in self.finished:
                self.page(shard_id)

    def page(self, shard_id):
        iterator = self.iterators.pop(shard_id, None)
        if iterator is None:
            answer = self.streams.get_shard_iterator(
                StreamArn=self.arn, ShardId=shard_id, ShardIteratorType="TRIM_HORIZON"
            )
            iterator = answer["ShardIterator"]
        answer = self.streams.get_records(ShardIterator=iterator)
        for record in answer["Records"]:
            self.take(record["eventName"], record["dynamodb"])
        following = answer.get("NextShardIterator")
        if following:
            self.iterators[shard_id] = following
            return
        self.finished.add(shard_id)
        for child in children(self.streams, self.arn, shard_id):
            if child["ParentShardId"] != shard_id:
                self.faults.append(f"{child} is no child of {shard_id}")
            self.shards[child["ShardId"]] = child

    def take(self, event, data):
        self.records += 1
        key = data["Keys"]["pk"]["S"]
        versions = self.history.setdefault(key, [])
        before = versions[-1] if versions else None
        if version(data.get("OldImage")) != before:
            self.faults.append(f"{key}: {data.get('OldImage')} follows {before}")
        now = version(data.get("NewImage"))
        kind = "REMOVE" if now is None else "INSERT" if before is None else "MODIFY"
        if event != kind:
            self.faults.append(f"{key}: {event} instead of {kind}")
        number = data["SequenceNumber"]
        if not 21 <= len(number) <= 40 or int(number) <= self.last_number.get(key, 0):
            self.faults.append(f"{key}: number {number} after {self.last_number.get(key)}")
        self.last_number[key] = int(number)
        versions.append(now)


def main(endpoint, table, expected_file):
    with open(expected_file, encoding="utf-8") as file:
        expected = json.load(file)
    streams = boto3.client(
        "dynamodbstreams",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id="peer",
        aws_secret_access_key="peer",
        config=Config(retries={"total_max_attempts": 1}, read_timeout=10),
    )
    arns = [s["StreamArn"] for s in streams.list_streams(TableName=table)["Streams"]]
    walk = Walk(streams, max(arns))
    wanted = sum(len(versions) for versions in expected.values())
    start, rest = time.monotonic(), ROUNDS_AFTER
    while rest and time.monotonic() - start < PATIENCE_SECONDS:
        walk.round()
        rest -= walk.records >= wanted
    for key in sorted(expected.keys() | walk.history.keys()):
        found = walk.history.get(key, [])
        if found != expected.get(key, []):
            walk.faults.append(f"{key}: {found} instead of {expected.get(key, [])}")
    told = {
        "records": walk.records,
        "shards": len(walk.shards),
        "finished": len(walk.finished),
        "boto3": boto3.__version__,
    }
    print(json.dumps(told))
    for fault in walk.faults:
        print(fault, file=sys.stderr)
    return 1 if walk.faults else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
