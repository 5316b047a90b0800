"""What every process of the many-process tests runs; the first argument says which."""

import os
import signal
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

import grpo_mesh

HEARTBEAT = 4


def meet(job: grpo_mesh.Job) -> None:
    grpo_mesh.barrier("start", 60)
    print(f"started rank {job.rank} of {job.processes}", flush=True)


def train(job: grpo_mesh.Job) -> None:
    mesh = grpo_mesh.make_mesh("auto")
    grpo_mesh.check_agreement({"config": {"seed": 1, "mesh": dict(mesh.shape)}, "data": grpo_mesh.digest({})})
    sharding = grpo_mesh.batch_sharding(mesh)
    batch = {"x": np.arange(64, dtype=np.float32).reshape(8, 8)}
    rows = grpo_mesh.local_rows(sharding, 8)
    whole = grpo_mesh.to_global(batch, sharding)
    from_rows = grpo_mesh.to_global({"x": batch["x"][rows]}, sharding, rows=8)
    for placed in (whole, from_rows):
        np.testing.assert_array_equal(grpo_mesh.to_host(placed)["x"], batch["x"])
        np.testing.assert_array_equal(grpo_mesh.to_local(placed)["x"], batch["x"][rows])
    moved = grpo_mesh.reshard(whole, grpo_mesh.replicated(mesh))
    for step in range(3):
        with grpo_mesh.deadline("update", 60):
            total = float(jax.jit(jnp.sum)(whole["x"]))
        print(f"step {step}: {total}", flush=True)
    print(f"digest {grpo_mesh.digest(whole)} {grpo_mesh.digest(moved)} {grpo_mesh.digest(batch)}")


def disagree(job: grpo_mesh.Job) -> None:
    grpo_mesh.check_agreement({"config": {"seed": job.rank // 2, "steps": 3}})


def kill_last(job: grpo_mesh.Job) -> None:
    meet(job)
    if job.rank == job.processes - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(300)


def kill_first(job: grpo_mesh.Job) -> None:
    meet(job)
    if job.rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(300)


def stay_away(job: grpo_mesh.Job) -> None:
    meet(job)
    if job.rank == 1:
        time.sleep(300)
    with grpo_mesh.deadline("update", 2):
        pass


def stall(job: grpo_mesh.Job) -> None:
    meet(job)
    with grpo_mesh.deadline("update", 2):
        time.sleep(300 if job.rank == 1 else 0)
    time.sleep(300)


def fail(job: grpo_mesh.Job) -> None:
    meet(job)
    if job.rank == 1:
        raise ValueError("something broke")
    time.sleep(300)


if __name__ == "__main__":
    globals()[sys.argv[1]](grpo_mesh.initialize(heartbeat=HEARTBEAT, timeout=60))
