"""Makes of config/route53-health-check.json what CloudFormation would: each resource by the call it
stands for, with the parameters' defaults. boto3 knows every field that Route 53 takes, and refuses
others. The answer is what Route 53 then holds."""

import json
import pathlib
import sys

import boto3

TEMPLATE = pathlib.Path(__file__).parents[2] / "config" / "route53-health-check.json"


def filled(value, known):
    """`value` with its references replaced."""
    if isinstance(value, dict):
        if set(value) == {"Ref"}:
            return known[value["Ref"]]
        return {name: filled(inner, known) for name, inner in value.items()}
    if isinstance(value, list):
        return [filled(inner, known) for inner in value]
    return value


def main() -> int:
    client = boto3.client("route53", endpoint_url=sys.argv[1], region_name="us-east-1",
                          aws_access_key_id="test", aws_secret_access_key="test")
    template = json.loads(TEMPLATE.read_text())
    known = {name: parameter.get("Default") for name, parameter in template["Parameters"].items()}
    zone = client.create_hosted_zone(Name="example.com", CallerReference="zone")["HostedZone"]["Id"]
    known["HostedZoneId"] = zone
    of_type = lambda kind: [item for item in template["Resources"].items() if item[1]["Type"] == kind]
    for name, resource in of_type("AWS::Route53::HealthCheck"):
        config = filled(resource["Properties"], known)["HealthCheckConfig"]
        made = client.create_health_check(CallerReference=name, HealthCheckConfig=config)
        known[name] = made["HealthCheck"]["Id"]
    for _, resource in of_type("AWS::Route53::RecordSet"):
        record = filled(resource["Properties"], known)
        record.pop("HostedZoneId")
        # Numbers are texts in CloudFormation, and values a plain list.
        record["TTL"] = int(record["TTL"])
        record["ResourceRecords"] = [{"Value": value} for value in record["ResourceRecords"]]
        change = {"Changes": [{"Action": "CREATE", "ResourceRecordSet": record}]}
        client.change_resource_record_sets(HostedZoneId=zone, ChangeBatch=change)
    checks = client.list_health_checks()["HealthChecks"]
    records = client.list_resource_record_sets(HostedZoneId=zone)["ResourceRecordSets"]
    json.dump({
        "checks": {check["Id"]: check["HealthCheckConfig"] for check in checks},
        "records": [record for record in records if record["Type"] == "CNAME"],
        "resources": len(template["Resources"]),
    }, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
