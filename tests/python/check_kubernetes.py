"""Checks the Kubernetes examples by schema: check_kubernetes.py FILE...; with --scripts FILE prints the containers' scripts.

Objects of Kubernetes itself against its OpenAPI schemas (package kubernetes-validate), strictly: a key that is not there
is an error. JobSets against the models of its API (package kubeflow-trainer-api), whose reader passes over unknown keys:
what it has understood must be all that was written.
"""

import json
import sys

import kubernetes_validate
import yaml
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

checked = 0


def differences(written, understood, path="$"):
    """Paths of what was written but not understood."""
    if isinstance(written, dict) and isinstance(understood, dict):
        for key, value in written.items():
            yield from differences(value, understood.get(key), f"{path}.{key}")
    elif isinstance(written, list) and isinstance(understood, list) and len(written) == len(understood):
        for number, (one, other) in enumerate(zip(written, understood)):
            yield from differences(one, other, f"{path}[{number}]")
    elif written != understood:
        yield f"{path}: {written!r} became {understood!r}"


def check(document):
    if document["kind"] == "JobSet":
        understood = JobsetV1alpha2JobSet.from_dict(document).to_dict()
        if found := list(differences(document, understood)):
            raise ValueError("; ".join(found))
        for job in document["spec"]["replicatedJobs"]:
            # each template is that of a Job
            metadata = {"name": job["name"]}
            check({"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": job["template"]["spec"]})
    else:
        kubernetes_validate.validate(document, "1.33", strict=True)


def containers(part):
    """All containers below a part of a document."""
    if isinstance(part, dict):
        yield from part.get("containers", [])
        part = list(part.values())
    if isinstance(part, list):
        for inner in part:
            yield from containers(inner)


if sys.argv[1] == "--scripts":
    with open(sys.argv[2]) as file:
        print(json.dumps({one["name"]: one["args"][0] for one in containers(list(yaml.safe_load_all(file)))}))
    sys.exit()

for name in sys.argv[1:]:
    with open(name) as file:
        for document in yaml.safe_load_all(file):
            try:
                check(document)
            except Exception as error:
                sys.exit(f"{name}: {document['kind']} {document['metadata']['name']}: {error}")
            checked += 1
print(f"{checked} objects are as their schemas want them")
