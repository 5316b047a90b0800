import shutil
import subprocess

import pytest
import yaml

from grpo_mesh import Launch, MeshError, RenderError, render_gcloud, render_jobset, render_slurm
from grpo_mesh.render import main

COMMAND = ["python", "-m", "train", "--name", "it's on: yes"]

# The fields of jobset.x-k8s.io/v1alpha2 and of the core types below it that a launcher may use, with their types. As in
# the API server's strict validation, an unknown field or a wrong type is an error. The JobSet's own fields were
# compared with its definition: kubernetes-sigs/jobset, charts/jobset/crds/jobset.x-k8s.io_jobsets.yaml at 01ad1d12.
QUANTITIES = {str: int}
ENV = {"name": str, "value": str, "valueFrom": {"fieldRef": {"fieldPath": str}}}
CONTAINER = {
    "name": str, "image": str, "command": [str], "env": [ENV], "ports": [{"containerPort": int}],
    "resources": {"limits": QUANTITIES, "requests": QUANTITIES}, "volumeMounts": [{"name": str, "mountPath": str}],
}  # fmt: skip
POD = {
    "restartPolicy": str, "containers": [CONTAINER], "volumes": [{"name": str, "emptyDir": {"medium": str}}],
    "nodeSelector": {str: str},
}  # fmt: skip
JOB = {
    "parallelism": int, "completions": int, "completionMode": str, "backoffLimit": int,
    "template": {"spec": POD},
}  # fmt: skip
JOBSET = {
    "apiVersion": str,
    "kind": str,
    "metadata": {"name": str, "namespace": str, "annotations": {str: str}},
    "spec": {
        "failurePolicy": {"maxRestarts": int},
        "network": {"enableDNSHostnames": bool, "publishNotReadyAddresses": bool},
        "replicatedJobs": [{"name": str, "replicas": int, "template": {"spec": JOB}}],
    },
}


def conform(value, schema, path="$"):
    if isinstance(schema, dict):
        assert isinstance(value, dict), path
        for key, item in value.items():
            expected = schema.get(key, schema.get(str))
            assert expected is not None, f"{path}.{key} is no field"
            conform(item, expected, f"{path}.{key}")
    elif isinstance(schema, list):
        assert isinstance(value, list), path
        for number, item in enumerate(value):
            conform(item, schema[0], f"{path}[{number}]")
    else:
        assert type(value) is schema, f"{path} must be {schema.__name__}: got {value!r}"


def tree(**settings):
    rendered = yaml.safe_load(render_jobset(Launch("grpo", COMMAND, image="registry/grpo:1", **settings)))
    conform(rendered, JOBSET)
    assert (rendered["apiVersion"], rendered["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (workers,) = rendered["spec"]["replicatedJobs"]
    job = workers["template"]["spec"]
    assert job["completionMode"] == "Indexed"
    assert job["parallelism"] == job["completions"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"] == COMMAND
    return rendered, workers, job, pod, container


def test_a_jobset_for_two_tpu_slices():
    rendered, workers, job, pod, container = tree(slice="v5e-16", slices=2, env={"A": "1: x"}, max_restarts=3)
    assert rendered["spec"]["failurePolicy"]["maxRestarts"] == 3
    assert (workers["replicas"], job["parallelism"]) == (2, 4)
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
    }
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert container["env"] == [{"name": "A", "value": "1: x"}]
    assert "alpha.jobset.sigs.k8s.io/exclusive-topology" in rendered["metadata"]["annotations"]


@pytest.mark.parametrize(
    ("slice_", "pods", "chips", "accelerator"),
    [
        ("v6e-8", 1, 8, "tpu-v6e-slice"),
        ("v4-32", 4, 4, "tpu-v4-podslice"),
        ("v5p-8", 1, 4, "tpu-v5p-slice"),
        ("v5e-1", 1, 1, "tpu-v5-lite-podslice"),
    ],
)
def test_pods_and_chips_of_a_slice(slice_, pods, chips, accelerator):
    _, _, job, pod, container = tree(slice=slice_)
    assert job["parallelism"] == pods
    assert container["resources"]["requests"] == {"google.com/tpu": chips}
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == accelerator


def test_a_jobset_for_gpus_carries_what_initialize_reads():
    _, workers, job, pod, container = tree(gpus=16)
    assert (workers["replicas"], job["parallelism"]) == (1, 2)
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    assert "nodeSelector" not in pod
    names = {item["name"]: item for item in container["env"]}
    # JOB_COMPLETION_INDEX is set by Kubernetes in every pod of an indexed Job.
    assert set(names) == {"JOBSET_NAME", "REPLICATED_JOB_NAME", "JOB_INDEX", "JOBSET_JOBS", "JOBSET_PODS"}
    path = names["JOB_INDEX"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert path == "metadata.annotations['jobset.sigs.k8s.io/job-index']"
    assert names["JOBSET_PODS"]["value"] == "2"


def test_a_gcloud_script_rents_runs_everywhere_and_gives_back(tmp_path):
    launch = Launch("grpo", COMMAND, slice="v5e-16", project="p", zone="z", env={"A": "b c"}, setup=["cd grpo"])
    text = render_gcloud(launch)
    assert "--accelerator-type=v5litepod-16 --version=v2-alpha-tpuv5-lite" in text
    assert "--worker=all" in text
    # Run it against a gcloud that writes its arguments down.
    fake = tmp_path / "gcloud"
    fake.write_text(f'#!/bin/sh\nprintf "%s\\n" "$*" >> {tmp_path}/log\n')
    fake.chmod(0o755)
    script = tmp_path / "run.sh"
    script.write_text(text)
    subprocess.run(["bash", script], check=True, env={"PATH": f"{tmp_path}:/usr/bin:/bin"})
    log = (tmp_path / "log").read_text()
    assert [line.split()[3] for line in log.splitlines() if line.startswith("compute")] == ["create", "ssh", "delete"]
    assert "export A='b c'\npython -m train --name 'it'\"'\"'s on: yes'" in log


def test_a_slurm_script(tmp_path):
    text = render_slurm(Launch("grpo", COMMAND, gpus=16, partition="a100", time="04:00:00", setup=["module load cuda"]))
    lines = text.splitlines()
    for line in ("#SBATCH --nodes=2", "#SBATCH --ntasks-per-node=8", "#SBATCH --gpus-per-node=8"):
        assert line in lines
    assert "#SBATCH --partition=a100" in lines
    assert not any("account" in line for line in lines)
    assert lines.index("module load cuda") < lines.index(lines[-1])
    assert lines[-1].startswith("srun --kill-on-bad-exit=1 --label python -m train")
    if bash := shutil.which("bash"):
        subprocess.run([bash, "-n", "-c", text], check=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "Grpo", "slice": "v5e-4"}, "name must be lower-case"),
        ({"command": "python train.py", "slice": "v5e-4"}, "command must be a list"),
        ({}, "exactly one of slice and gpus"),
        ({"slice": "v5e-4", "gpus": 8}, "exactly one of slice and gpus"),
        ({"gpus": 12}, "gpus must fill hosts of gpus_per_host = 8: got 12"),
        ({"gpus": 8, "slices": 2}, "slices must be positive, and 1 for GPUs"),
    ],
)
def test_an_impossible_launch_is_refused(settings, message):
    with pytest.raises(RenderError, match=message):
        Launch(**{"name": "grpo", "command": COMMAND} | settings)


def test_each_engine_asks_for_what_it_needs():
    tpu, gpu = Launch("grpo", COMMAND, slice="v5e-4"), Launch("grpo", COMMAND, gpus=8)
    with pytest.raises(RenderError, match="needs image"):
        render_jobset(tpu)
    with pytest.raises(RenderError, match="needs project and zone"):
        render_gcloud(tpu)
    with pytest.raises(RenderError, match="one TPU slice"):
        render_gcloud(gpu)
    with pytest.raises(RenderError, match="slurm runs GPU jobs"):
        render_slurm(tpu)
    with pytest.raises(MeshError, match="not offered"):
        render_jobset(Launch("grpo", COMMAND, slice="v5e-5", image="x"))


def test_the_command_line_reads_toml(tmp_path, capsys):
    file = tmp_path / "launch.toml"
    file.write_text('name = "grpo"\ncommand = ["python", "x.py"]\nslice = "v6e-16"\nimage = "i"\n[env]\nA = "1"\n')
    assert main(["jobset", str(file)]) == 0
    rendered = yaml.safe_load(capsys.readouterr().out)
    assert rendered["spec"]["replicatedJobs"][0]["template"]["spec"]["parallelism"] == 4
    file.write_text('name = "grpo"\ncommand = ["python"]\nslize = "v6e-16"\n')
    assert main(["jobset", str(file)]) == 2
    assert "unknown key slize" in capsys.readouterr().err
    assert main(["jobset", str(tmp_path / "absent")]) == 2
