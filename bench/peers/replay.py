"""Replays one shard into a table the way most people begin: with boto3, one record after another.

    python replay.py put   ENDPOINT STREAM_ARN TABLE RECORDS
    python replay.py batch ENDPOINT STREAM_ARN TABLE RECORDS

`put` is the shape of a typical replication Lambda: one PutItem or DeleteItem for each record, with the image as
the stream gave it. `batch` uses boto3's own batch writer, which wants the image in Python's types.
"""

import sys

import boto3
from boto3.dynamodb.types import TypeDeserializer

REGION = "us-east-1"
# What `python -m pip install boto3` gives: no retries, pools or timeouts are tuned.
SESSION = boto3.session.Session(region_name=REGION)


def pages(endpoint, stream_arn, records):
    """The pages of the first shard, until so many records were read."""
    streams = SESSION.client("dynamodbstreams", endpoint_url=endpoint)
    described = streams.describe_stream(StreamArn=stream_arn)
    shard = described["StreamDescription"]["Shards"][0]["ShardId"]
    iterator = streams.get_shard_iterator(
        StreamArn=stream_arn, ShardId=shard, ShardIteratorType="TRIM_HORIZON"
    )["ShardIterator"]
    read = 0
    while read < records:
        page = streams.get_records(ShardIterator=iterator, Limit=1000)
        yield page["Records"]
        read += len(page["Records"])
        iterator = page["NextShardIterator"]


def put(endpoint, stream_arn, table, records):
    client = SESSION.client("dynamodb", endpoint_url=endpoint)
    for page in pages(endpoint, stream_arn, records):
        for record in page:
            change = record["dynamodb"]
            if record["eventName"] == "REMOVE":
                client.delete_item(TableName=table, Key=change["Keys"])
            else:
                client.put_item(TableName=table, Item=change["NewImage"])


def batch(endpoint, stream_arn, table, records):
    resource = SESSION.resource("dynamodb", endpoint_url=endpoint)
    python = TypeDeserializer().deserialize

    def item(image):
        return {name: python(value) for name, value in image.items()}

    with resource.Table(table).batch_writer(overwrite_by_pkeys=["id"]) as writer:
        for page in pages(endpoint, stream_arn, records):
            for record in page:
                change = record["dynamodb"]
                if record["eventName"] == "REMOVE":
                    writer.delete_item(Key=item(change["Keys"]))
                else:
                    writer.put_item(Item=item(change["NewImage"]))


if __name__ == "__main__":
    how, endpoint, stream_arn, table, records = sys.argv[1:]
    {"put": put, "batch": batch}[how](endpoint, stream_arn, table, int(records))
