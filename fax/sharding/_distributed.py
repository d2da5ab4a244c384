"""One program in several processes: their number, and the address of process 0."""

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

    Call this once in every process, before any other use of JAX. Afterward `jax.devices` lists
    the devices of all processes, and a mesh may span them. CPUs communicate through gloo, so this
    works on any machine.

    Arguments that are not passed are taken from the environment, which may be

    - ``JAX_COORDINATOR_ADDRESS``, ``JAX_NUM_PROCESSES`` and ``JAX_PROCESS_ID``,
    - Slurm (``srun``),
    - MPI (``mpiexec`` of Open MPI, MPICH, MVAPICH and Intel MPI). If the processes are on several
      hosts, all but Open MPI 4 also need the address of process 0,
    - a TPU pod, also on GKE, or an indexed Kubernetes job, as `jax.distributed.initialize` finds
      them.

    With Slurm and MPI, every process uses the GPU with its local number, unless
    ``local_device_ids`` says otherwise.

    When a process dies or ends with an exception, all others print which one it was and exit at
    once, with status 3. A process that stops responding is named by the others after a third of
    ``heartbeat_timeout``. While JAX is being set up, they exit after ``heartbeat_timeout``; later
    JAX's own heartbeats abort them after about the same time. On a TPU pod or Kubernetes only JAX's
    heartbeats are available. A process that exits through `sys.exit` counts as finished.

    Until all processes have connected, one that dies may be restarted within ``heartbeat_timeout``.
    If it is not restarted, or stops responding for that long, all others raise an error that names
    it.

    Process 0 listens only at the coordinator's address, first for the others and then for JAX.
    Connections without the token are rejected and have no effect. The token protects only the
    start; what JAX sends afterward is neither authenticated nor encrypted, so run on a network
    that you trust.

    Args:
      coordinator_address: host and port of process 0, as in ``"10.0.0.1:1234"``,
        ``"[fd00::1]:1234"`` or ``"node7:1234"``. The port must be free. If the machine of process
        0 does not have this address, ``JAX_COORDINATOR_BIND_ADDRESS`` says where it listens.
      num_processes: the number of processes.
      process_id: the number of this process, starting from 0.
      local_device_ids: which of the host's GPUs belong to this process.
      token: a secret of at least 16 characters that the processes of this run share. Default: the
        environment variable ``FAX_TOKEN``. Create a new one for each run. Without a token, the job
        number of Slurm or Open MPI separates runs, but it is not secret; process 0 warns if other
        machines can reach it.
      initialization_timeout: how many seconds to wait for the other processes to start.
      heartbeat_timeout: after how many seconds of silence a process counts as dead.
      shutdown_timeout: how many seconds a finished process waits for the others to finish.

    Raises:
      ValueError: if an argument is invalid, or neither passed nor found in the environment.
      RuntimeError: if JAX is already in use, this was called before, not all processes connect in
        time, or process 0 cannot listen.

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
        # JAX checks once a second, and should have ended this process by then.
        "heartbeat_timeout_seconds": max(math.ceil(heartbeat_timeout) - 1, 1),
        "shutdown_timeout_seconds": math.ceil(shutdown_timeout),
    }
    if address is None or count is None or me is None:
        if token is not None:
            warnings.warn(
                "fax.sharding.initialize: the token is not used, because here JAX alone connects "
                "the processes. To use it, pass coordinator_address, num_processes and process_id.",
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
            "jax.distributed.initialize. Call it only once, at the start of the program."
        )
    try:
        # JAX exports no test for whether it is in use. But it tests this before it looks at the
        # arguments, and these arguments it refuses.
        jax.distributed.initialize("localhost:0", 1, 1, cluster_detection_method="deactivate")
    except ValueError:
        return
    except RuntimeError as error:
        raise RuntimeError(
            "fax.sharding.initialize was called after JAX had been used. Call it at the start of "
            "the program, before you create arrays or call jax.devices."
        ) from error


def _check(address: str | None, count: int | None, me: int | None) -> None:
    """Checks the arguments that are known. The others are None."""
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
        raise ValueError(f"{where}: num_processes is {count}, expected an int of at least 1.")
    if me is not None and (me < 0 or (count is not None and me >= count)):
        bound = "of at least 0"
        if count is not None:
            bound = f"from 0 to {count - 1}, because num_processes is {count}"
        raise ValueError(f"{where}: process_id is {me}, expected an int {bound}.")


def _token(token: str | None) -> str | None:
    """Returns the token that is passed or in the environment, after checking its length."""
    name = "token" if token is not None else "the environment variable FAX_TOKEN"
    found = os.environ.get("FAX_TOKEN") if token is None else token
    if found is not None and (not isinstance(found, str) or len(found) < 16):
        what = f"has {len(found)} characters" if isinstance(found, str) else "is not a str"
        raise ValueError(
            f"fax.sharding.initialize: {name} {what}, expected a str of at least 16 characters "
            "that cannot be guessed, such as the output of `openssl rand -hex 16`."
        )
    return found


def _int(name: str, value: Any) -> int:
    return _arguments.count("fax.sharding.initialize", name, value, least=None)


def _detect(
    address: str | None, count: int | None, me: int | None, options: Mapping[str, Any]
) -> None:
    """Lets JAX find what is still unknown, on a TPU pod or on Kubernetes."""
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
            f"start the processes with srun or mpiexec. A single process needs none of this. (JAX: "
            f"{error})"
        ) from error


# The environment variables of launchers


class Found(NamedTuple):
    """What the environment specifies. The other fields are None."""

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


# MPI comes before Slurm: processes that mpiexec starts in a Slurm job also see the variables of
# the step that runs mpiexec itself.
_LAUNCHERS = (
    _Launcher("JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "", ""),
    _Launcher(*(f"OMPI_COMM_WORLD_{x}" for x in ("SIZE", "RANK", "LOCAL_RANK", "LOCAL_SIZE"))),
    _Launcher(*(f"MV2_COMM_WORLD_{x}" for x in ("SIZE", "RANK", "LOCAL_RANK", "LOCAL_SIZE"))),
    _Launcher("PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    _Launcher("SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", ""),
)
_FIRST_PORT, _PORTS = 61440, 4096  # if no port is given, choose one from the end of the range


def find(env: Mapping[str, str]) -> Found:
    """Returns what the environment ``env`` specifies about this process."""
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
    """Returns the launcher's name of the run, the same in all its processes, or ""."""
    launcher = _launcher(env)
    if launcher is None:
        return ""
    names = {"OMPI_COMM_WORLD_SIZE": "PMIX_NAMESPACE", "SLURM_NTASKS": "SLURM_JOB_ID"}
    job = env.get(names.get(launcher.processes, ""), "")
    step = env.get("SLURM_STEP_ID", "") if launcher.processes == "SLURM_NTASKS" else ""
    return f"{launcher.processes} {job} {step}" if job else ""


def _launcher(env: Mapping[str, str]) -> _Launcher | None:
    for launcher in _LAUNCHERS:
        # The script of a Slurm job is not one of its steps, and runs only once.
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
    """Returns the address of process 0, by the same rules as JAX, or None."""
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
