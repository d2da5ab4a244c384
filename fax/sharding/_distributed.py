"""One program in several processes: who they are and where they meet."""

from __future__ import annotations

import math
import os
import re
import time
import warnings
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from fax import _arguments
from fax.sharding import _peers
from fax.sharding._address import BIND


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    local_device_ids: int | Sequence[int] | None = None,
    token: str | None = None,
    initialization_timeout: int = 300,
    heartbeat_timeout: int = 30,
    shutdown_timeout: int = 300,
) -> None:
    """Makes this process one of several that run the same program together.

    Every process calls this once, before anything else is done with JAX. Afterwards
    `jax.devices` lists the devices of all processes, and a mesh may span them. CPUs communicate by
    gloo, so that this works on any machine.

    What is not passed is taken from the environment, where there is

    - ``JAX_COORDINATOR_ADDRESS``, ``JAX_NUM_PROCESSES`` and ``JAX_PROCESS_ID``,
    - Slurm (``srun``),
    - MPI (``mpiexec`` of Open MPI, MPICH, MVAPICH and Intel MPI). If its processes are on several
      hosts, all but Open MPI 4 have to be told where process 0 is,
    - a TPU pod, on GKE too, or an indexed job of Kubernetes, as `jax.distributed.initialize` finds
      them.

    With Slurm and MPI every process uses the GPU of its local number, unless ``local_device_ids``
    says otherwise.

    When a process dies or an exception ends it, all others print which one it was and end at once,
    with exit status 3. One that stands still is named by all others after a third of
    ``heartbeat_timeout``; while JAX is being set up they end after that time, later JAX's own
    heartbeats abort them, within about that time. On a TPU pod or Kubernetes there are these
    alone. A process that leaves by `sys.exit` counts as finished.

    Until all have met, a process that dies may be started again within ``heartbeat_timeout``. If it
    is not, or stands still for as long, all others raise an error that names it.

    Process 0 listens at the coordinator's address only, first for the others and then for JAX.
    Whoever comes without the token is turned away and changes nothing. The token guards the
    meeting; what JAX sends afterwards is neither authenticated nor encrypted, so run on a network
    that you trust.

    Args:
      coordinator_address: host and port of process 0, as in ``"10.0.0.1:1234"``,
        ``"[fd00::1]:1234"`` or ``"node7:1234"``. The port must be free. If process 0 does not
        have this address itself, ``JAX_COORDINATOR_BIND_ADDRESS`` says where it listens.
      num_processes: how many processes there are.
      process_id: the number of this one, from 0.
      local_device_ids: which of the host's GPUs are this process's own.
      token: a secret of at least 16 characters that the processes of this run share. Default: the
        environment variable ``FAX_TOKEN``. Make a new one for each run. Without it, the job's
        number that Slurm or Open MPI gives keeps other runs apart, but is no secret; if process 0
        can be reached from other machines, it warns.
      initialization_timeout: how many seconds to wait for the other processes to start.
      heartbeat_timeout: after how many seconds of silence a process counts as dead.
      shutdown_timeout: how many seconds a process that has finished waits for the others to finish.

    Raises:
      ValueError: if something is neither passed nor found in the environment, or does not fit.
      RuntimeError: if JAX is in use already, this was called before, the processes do not all
        meet in time, or process 0 cannot listen.

    Example:

      >>> fax.sharding.initialize("localhost:1234", 2, 0)  # doctest: +SKIP
      >>> mesh = fax.sharding.make_mesh(clients=-1)
    """
    _check_unused()
    found = find(os.environ)
    address = found.address if coordinator_address is None else coordinator_address
    count = found.processes if num_processes is None else _int("num_processes", num_processes)
    me = found.number if process_id is None else _int("process_id", process_id)
    _check(address, count, me)
    token = _token(token)
    for name, value in (
        ("initialization_timeout", initialization_timeout),
        ("heartbeat_timeout", heartbeat_timeout),
        ("shutdown_timeout", shutdown_timeout),
    ):
        _arguments.number("fax.sharding.initialize", name, value, above=0)
    if jax.config.jax_cpu_collectives_implementation in (None, "none"):
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    options: dict[str, Any] = {
        "local_device_ids": local_device_ids,
        "initialization_timeout": math.ceil(initialization_timeout),
        # JAX looks once a second, and should have ended this process by then.
        "heartbeat_timeout_seconds": max(math.ceil(heartbeat_timeout) - 1, 1),
        "shutdown_timeout_seconds": math.ceil(shutdown_timeout),
    }
    if address is None or count is None or me is None:
        if token is not None:
            warnings.warn(
                "fax.sharding.initialize: the token is not used, because the processes find each "
                "other by JAX alone here. Pass coordinator_address, num_processes and process_id.",
                stacklevel=2,
            )
        _detect(address, count, me, options)
        return
    if local_device_ids is None and process_id is None:
        options["local_device_ids"] = found.local
    started = time.monotonic()
    job = job_of(os.environ) if num_processes is None and process_id is None else ""
    watch = _peers.meet(
        address,
        count,
        me,
        initialization_timeout,
        heartbeat=heartbeat_timeout,
        token=token,
        job=job,
    )
    watch.start()
    left = initialization_timeout - (time.monotonic() - started)
    options["initialization_timeout"] = math.ceil(max(left, heartbeat_timeout))
    jax.distributed.initialize(
        address,
        count,
        me,
        cluster_detection_method="deactivate",
        coordinator_bind_address=watch.bind,
        **options,
    )
    watch.starting = False


def _check_unused() -> None:
    if jax.distributed.is_initialized():
        raise RuntimeError(
            "fax.sharding.initialize was called a second time, or after "
            "jax.distributed.initialize. Call it once, at the start of the program."
        )
    try:
        # JAX exports no question whether it is in use, but asks it itself before it looks at
        # arguments, and these it refuses.
        jax.distributed.initialize("localhost:0", 1, 1, cluster_detection_method="deactivate")
    except ValueError:
        return
    except RuntimeError as error:
        raise RuntimeError(
            "fax.sharding.initialize was called after JAX had been used. Call it at the start of "
            "the program, before arrays are made or jax.devices is called."
        ) from error


def _check(address: str | None, count: int | None, me: int | None) -> None:
    """Refuses what cannot be right. None is what is not known."""
    where = "fax.sharding.initialize"
    for name, value in (("coordinator_address", address), (BIND, os.environ.get(BIND))):
        if value is None:
            continue
        if not re.fullmatch(r"(\[[^\]]+\]|[^:\s]+):\d{1,5}", str(value)):
            raise ValueError(
                f"{where}: {name} is {value!r}, expected the host and port of process 0, as in "
                "'10.0.0.1:1234'."
            )
        if not 0 < int(value.rsplit(":", 1)[1]) < 1 << 16:
            raise ValueError(f"{where}: {name} is {value!r}, expected a port from 1 to 65535.")
    if count is not None and count < 1:
        raise ValueError(f"{where}: num_processes is {count}, expected at least 1.")
    if me is not None and (me < 0 or (count is not None and me >= count)):
        raise ValueError(
            f"{where}: process_id is {me}, expected a number from 0 up to num_processes, which is "
            f"{'not given' if count is None else count}."
        )


def _token(token: str | None) -> str | None:
    """The token that is passed or in the environment, if it is one that cannot be guessed."""
    name = "token" if token is not None else "the environment variable FAX_TOKEN"
    found = os.environ.get("FAX_TOKEN") if token is None else token
    if found is not None and (not isinstance(found, str) or len(found) < 16):
        what = f"has {len(found)} characters" if isinstance(found, str) else "is no str"
        raise ValueError(
            f"fax.sharding.initialize: {name} {what}, expected at least 16 characters of a str "
            "that nobody can guess, as `openssl rand -hex 16` makes it."
        )
    return found


def _int(name: str, value: Any) -> int:
    return _arguments.count("fax.sharding.initialize", name, value, least=None)


def _detect(
    address: str | None, count: int | None, me: int | None, options: Mapping[str, Any]
) -> None:
    """Leaves to JAX what is still unknown: it can ask a TPU pod or Kubernetes."""
    try:
        jax.distributed.initialize(address, count, me, **options)
    except (ValueError, TypeError, LookupError, RuntimeError) as error:
        values = {"coordinator_address": address, "num_processes": count, "process_id": me}
        unknown = " and ".join(name for name, value in values.items() if value is None)
        known = ", ".join(f"{name}={v!r}" for name, v in values.items() if v is not None)
        raise ValueError(
            f"fax.sharding.initialize: {unknown} is neither passed nor found in the environment"
            f"{f', where {known}' if known else ''}. Pass coordinator_address, num_processes and "
            "process_id, set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or "
            f"start the processes by srun or mpiexec. A single process needs none of this. (JAX: "
            f"{error})"
        ) from error


# What launchers say in the environment


class Found(NamedTuple):
    """What the environment says. None is what it does not say."""

    address: str | None = None
    processes: int | None = None
    number: int | None = None
    local: int | None = None


class _Launcher(NamedTuple):
    """The names of the variables that a launcher sets for each process."""

    processes: str
    number: str
    local: str
    local_processes: str


# MPI comes first: where mpiexec starts processes in a job of Slurm, they see the variables of the
# step that belongs to mpiexec itself.
_LAUNCHERS = (
    _Launcher("JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "", ""),
    _Launcher(*(f"OMPI_COMM_WORLD_{x}" for x in ("SIZE", "RANK", "LOCAL_RANK", "LOCAL_SIZE"))),
    _Launcher(*(f"MV2_COMM_WORLD_{x}" for x in ("SIZE", "RANK", "LOCAL_RANK", "LOCAL_SIZE"))),
    _Launcher("PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    _Launcher("SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", ""),
)
_FIRST_PORT, _PORTS = 61440, 4096  # where a port is not given, one from the end of the range


def find(env: Mapping[str, str]) -> Found:
    """What a launcher says about this process in the environment ``env``."""
    launcher = _launcher(env)
    if launcher is None:
        return Found(
            env.get("JAX_COORDINATOR_ADDRESS"),
            _number(env, "JAX_NUM_PROCESSES"),
            _number(env, "JAX_PROCESS_ID"),
        )
    processes = _number(env, launcher.processes)
    on_one_host = processes == _number(env, launcher.local_processes)
    return Found(
        env.get("JAX_COORDINATOR_ADDRESS") or _coordinator(env, launcher, on_one_host),
        processes,
        _number(env, launcher.number),
        _number(env, launcher.local),
    )


def job_of(env: Mapping[str, str]) -> str:
    """What a launcher calls the run, alike in all of its processes, or nothing."""
    launcher = _launcher(env)
    if launcher is None:
        return ""
    names = {"OMPI_COMM_WORLD_SIZE": "PMIX_NAMESPACE", "SLURM_NTASKS": "SLURM_JOB_ID"}
    job = env.get(names.get(launcher.processes, ""), "")
    step = env.get("SLURM_STEP_ID", "") if launcher.processes == "SLURM_NTASKS" else ""
    return f"{launcher.processes} {job} {step}" if job else ""


def _launcher(env: Mapping[str, str]) -> _Launcher | None:
    for launcher in _LAUNCHERS:
        # The script of a job of Slurm is no step of it, and runs but once.
        if launcher.processes == "SLURM_NTASKS" and "SLURM_STEP_NODELIST" not in env:
            continue
        if launcher.processes in env and launcher.number in env:
            return launcher
    return None


def _number(env: Mapping[str, str], name: str) -> int | None:
    value = env.get(name)
    if value is None:
        return None
    if not value.isdecimal():
        raise ValueError(
            f"fax.sharding.initialize: the environment has {name}={value!r}, expected an int."
        )
    return int(value)


def _coordinator(env: Mapping[str, str], launcher: _Launcher, on_one_host: bool) -> str | None:
    """Where all processes would look for process 0, by the same rules as in JAX."""
    uri = env.get("OMPI_MCA_orte_hnp_uri", "")
    at = re.match(r"(\d+)\..*?;tcp6?://(?:\[([^,\]]+)|([^,:]+))", uri)
    if on_one_host:
        job = env.get("PMIX_NAMESPACE") or env.get("SLURM_JOB_ID") or uri
        host, port = "localhost", zlib.crc32(job.encode())
    elif launcher.processes.startswith("OMPI") and at:
        host, port = (f"[{at[2]}]" if at[2] else at[3]), int(at[1]) >> 12
    elif "SLURM_STEP_NODELIST" in env and env.get("SLURM_JOB_ID", "").isdecimal():
        # The first host of a list such as node[007,010-012],other3.
        nodes = env["SLURM_STEP_NODELIST"]
        host = re.sub(r"^([^,\[]*)\[([^,\-\]]+)[^\]]*\]([^,\[]*).*", r"\1\2\3", nodes).split(",")[0]
        port = int(env["SLURM_JOB_ID"])
    else:
        return None
    return f"{host}:{env.get('JAX_COORDINATOR_PORT') or _FIRST_PORT + port % _PORTS}"
