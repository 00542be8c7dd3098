"""Writes a workload into a table with boto3.

    python workload.py ENDPOINT_URL REGION TABLE SEED CALLS CALLS_PER_SECOND

The table has the keys `pk` (S) and `sk` (N). CALLS are puts, updates, deletes, batches and
transactions over a few hundred keys, with values of every type; at most CALLS_PER_SECOND, so that
something happens besides however fast the machine is. Prints what it did as JSON. The same seed
does the same.
"""

import json
import random
import sys
import time
from collections import Counter

import boto3
from botocore.config import Config

PARTITIONS = 60
SORT_KEYS = ("0", "-1.5", "7", "12345678901234567890123456789012345678", "0.001")
TEXTS = ("", "plain", "ä 漢 🙂", 'quotes " and \\', "line\nbreak", "\u0001\u007f\uffff", " ")


def client(endpoint, region):
    return boto3.client(
        "dynamodb",
        endpoint_url=endpoint,
        region_name=region,
        aws_access_key_id="test",
        aws_secret_access_key="test",
        config=Config(retries={"mode": "standard", "total_max_attempts": 5}, read_timeout=20),
    )


class Workload:
    def __init__(self, dynamo, table, seed):
        self.dynamo, self.table, self.random = dynamo, table, random.Random(seed)
        self.calls, self.changes, self.kinds = Counter(), 0, set()

    def key(self):
        partition = f"p{self.random.randrange(PARTITIONS)}"
        return {"pk": {"S": partition}, "sk": {"N": self.random.choice(SORT_KEYS)}}

    def keys(self, count):
        """Different keys: a batch takes none twice."""
        found = {}
        while len(found) < count:
            key = self.key()
            found[key["pk"]["S"], key["sk"]["N"]] = key
        return list(found.values())

    def number(self):
        digits = self.random.randint(1, 38)
        text = str(self.random.randrange(1, 10)) + "".join(
            str(self.random.randrange(10)) for _ in range(digits - 1)
        )
        shape = self.random.randrange(4)
        if shape == 0:
            return "-" + text
        if shape == 1 and digits > 1:
            return text[:1] + "." + text[1:-1] + "5"
        return "0" if shape == 2 and digits == 1 else text

    def text(self):
        if self.random.random() < 0.3:
            return self.random.choice(TEXTS)
        return "".join(self.random.choices("abcäöü漢字🙂 -_", k=self.random.randrange(60)))

    def value(self, depth=0):
        kinds = ["S", "N", "B", "BOOL", "NULL", "SS", "NS", "BS"] + ["L", "M"] * (depth < 4)
        kind = self.random.choice(kinds)
        self.kinds.add(kind)
        many = range(self.random.randint(1, 4))
        if kind == "S":
            return {"S": self.text()}
        if kind == "N":
            return {"N": self.number()}
        if kind == "B":
            return {"B": self.random.randbytes(self.random.randrange(80))}
        if kind == "BOOL":
            return {"BOOL": self.random.random() < 0.5}
        if kind == "NULL":
            return {"NULL": True}
        if kind == "SS":
            return {"SS": sorted({f"{n}{self.text()}" for n in many})}
        if kind == "NS":
            return {"NS": [str(n * 10 + self.random.randrange(10)) for n in many]}
        if kind == "BS":
            return {"BS": [bytes([n]) + self.random.randbytes(5) for n in many]}
        if kind == "L":
            return {"L": [self.value(depth + 1) for _ in many]}
        return {"M": {f"name {n}": self.value(depth + 1) for n in many}}

    def item(self, key):
        item = dict(key)
        for n in range(self.random.randint(0, 6)):
            item[f"attribute {n}"] = self.value()
        if self.random.random() < 0.01:
            item["large"] = {"S": self.random.choice("aä") * 150_000}
        return item

    def put(self):
        self.dynamo.put_item(TableName=self.table, Item=self.item(self.key()))
        return 1

    def update(self):
        self.dynamo.update_item(
            TableName=self.table,
            Key=self.key(),
            UpdateExpression="SET #touched = :value, #log = list_append(if_not_exists(#log, :none), :one)"
            " REMOVE #gone ADD #count :n, #seen :set",
            ExpressionAttributeNames={
                "#touched": "touched",
                "#log": f"log {self.random.randrange(200)}",
                "#gone": "attribute 0",
                "#count": "count",
                "#seen": f"seen {self.random.randrange(3)}",
            },
            ExpressionAttributeValues={
                ":value": self.value(),
                ":none": {"L": []},
                ":one": {"L": [self.value(3)]},
                ":n": {"N": str(self.random.randrange(-5, 100))},
                ":set": {"NS": [str(self.random.randrange(1000))]},
            },
        )
        return 1

    def delete(self):
        self.dynamo.delete_item(TableName=self.table, Key=self.key())
        return 1

    def batch(self):
        requests = [
            {"DeleteRequest": {"Key": key}}
            if self.random.random() < 0.3
            else {"PutRequest": {"Item": self.item(key)}}
            for key in self.keys(self.random.randint(2, 25))
        ]
        waiting = {self.table: requests}
        while waiting:
            waiting = self.dynamo.batch_write_item(RequestItems=waiting)["UnprocessedItems"]
        return len(requests)

    def transaction(self):
        keys = self.keys(3)
        put, delete, update = keys
        target = {"TableName": self.table}
        self.dynamo.transact_write_items(
            TransactItems=[
                {"Put": target | {"Item": self.item(put)}},
                {"Delete": target | {"Key": delete}},
                {
                    "Update": target
                    | {
                        "Key": update,
                        "UpdateExpression": "SET transacted = :value",
                        "ExpressionAttributeValues": {":value": self.value()},
                    }
                },
            ]
        )
        return len(keys)

    def run(self, calls, calls_per_second):
        kinds = {"put": 40, "update": 30, "delete": 15, "batch": 12, "transaction": 3}
        start = time.monotonic()
        for done, name in enumerate(self.random.choices(list(kinds), list(kinds.values()), k=calls)):
            early = start + done / calls_per_second - time.monotonic()
            if early > 0:
                time.sleep(early)
            self.changes += getattr(self, name)()
            self.calls[name] += 1


def main(endpoint, region, table, seed, calls, calls_per_second):
    workload = Workload(client(endpoint, region), table, int(seed))
    start = time.monotonic()
    workload.run(int(calls), float(calls_per_second))
    told = {
        "seed": int(seed),
        "calls": dict(sorted(workload.calls.items())),
        "writes": workload.changes,
        "types": sorted(workload.kinds),
        "seconds": round(time.monotonic() - start, 1),
        "boto3": boto3.__version__,
    }
    print(json.dumps(told))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
