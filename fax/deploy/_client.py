"""A process that runs stages for some clients. It needs JAX, and neither fax nor the model's code.

    python _client.py ADDRESS [--load MODULE:FUNCTION] [--number N] [--plan FOLDER]

connects to a server, which sends stages and what they work on. The server gets only what a stage
sends, or rows that it asks for. With ``--load``, the clients' data come from a function, called
with the process's number, which returns ``{client: {name: array}}``. With ``--plan``, the process
runs only the stages in a folder that `fax.deploy.Plan.save` wrote, and sends only what they send.

A message is a JSON document followed by the bytes of its arrays. Nothing is pickled. The key of the
connection is the first line of standard input.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import math
import os
import pathlib
import runpy
import signal
import socket
import struct
import sys
import threading
import types
from collections.abc import Callable, Sequence
from multiprocessing import connection
from typing import Any

import jax
import numpy as np
from jax import export

# Messages

LARGEST = 2**34  # bytes
_SIZE = struct.Struct("<Q")


class MessageError(ValueError):
    """Bytes that are not a message."""


def encode(message: Any) -> bytes:
    """A message of None, bools, numbers, strings, lists, dicts with strings, bytes, and arrays."""
    text, *buffers = parts(message)
    return b"".join([_SIZE.pack(len(text)), text, *buffers])


def parts(message: Any) -> list[bytes]:
    """The JSON document of a message, and after it the bytes of each array."""
    buffers: list[bytes] = []

    def plain(x: Any) -> Any:
        if isinstance(x, dict):
            return {str(name): plain(value) for name, value in x.items()}
        if isinstance(x, list | tuple):
            return [plain(value) for value in x]
        number = isinstance(x, bool | int | float) and not isinstance(x, np.generic)
        if x is None or number or isinstance(x, str):
            return x
        if isinstance(x, bytes):
            buffers.append(x)
            return {"": "bytes", "size": len(x)}
        impl = None
        if jax.dtypes.issubdtype(getattr(x, "dtype", None), jax.dtypes.prng_key):
            impl, x = str(jax.random.key_impl(x)), jax.random.key_data(x)
        array = np.asarray(x)
        if array.dtype.hasobject:
            raise TypeError(f"a message cannot hold a {type(x).__name__}")
        array = array.astype(array.dtype.newbyteorder("="), copy=False)
        name = "float0" if array.dtype == jax.dtypes.float0 else array.dtype.name
        buffers.append(array.tobytes())
        return {"": "array", "dtype": name, "shape": list(array.shape), "key": impl}

    return [json.dumps(plain(message)).encode(), *buffers]


def decode(data: bytes) -> Any:
    """The message that `encode` made. Arrays are NumPy's, and random keys JAX's.

    Raises:
      MessageError: if the bytes are anything else.
    """
    try:
        (size,) = _SIZE.unpack_from(data)
        end = _SIZE.size + size
        if end > len(data):
            raise MessageError("a message is truncated")
        rest = memoryview(data)[end:]

        def value(x: Any) -> Any:
            nonlocal rest
            if isinstance(x, list):
                return [value(each) for each in x]
            if not isinstance(x, dict):
                return x
            if "" not in x:
                return {name: value(each) for name, each in x.items()}
            own = _Buffer(x)
            if own.size > len(rest):
                raise MessageError("a message is truncated")
            part, rest = rest[: own.size], rest[own.size :]
            return own.read(part)

        found = value(json.loads(data[_SIZE.size : end]))
    except MessageError:
        raise
    except (struct.error, ValueError, KeyError, TypeError, RecursionError) as error:
        raise MessageError(f"not a message: {error}") from error
    if len(rest):
        raise MessageError(f"a message has {len(rest)} bytes too many")
    return found


class _Buffer:
    """How the bytes of an array, or bytes, are described."""

    def __init__(self, about: dict[str, Any]):
        self.kind = about[""]
        if self.kind == "bytes":
            self.size = _count(about["size"])
            return
        is_float0 = about["dtype"] == "float0"  # of derivatives by integers; without any bytes
        self.dtype = jax.dtypes.float0 if is_float0 else jax.numpy.dtype(about["dtype"])
        self.shape = tuple(map(_count, about["shape"]))
        self.key = about["key"]
        if self.kind != "array" or self.dtype.hasobject or not isinstance(self.key, str | None):
            raise MessageError("not a message")
        self.size = math.prod(self.shape) * self.dtype.itemsize
        if self.size > LARGEST:
            raise MessageError(f"an array of {self.size} bytes is too large")

    def read(self, part: memoryview) -> Any:
        if self.kind == "bytes":
            return bytes(part)
        if self.dtype == jax.dtypes.float0:
            return np.zeros(self.shape, self.dtype)
        array = np.frombuffer(part, self.dtype).reshape(self.shape)
        if self.key is None:
            return array
        return jax.random.wrap_key_data(jax.numpy.asarray(array), impl=self.key)


def _count(x: Any) -> int:
    if isinstance(x, bool) or not isinstance(x, int) or x < 0:
        raise MessageError("not a message")
    return x


# Stages


class RefusedError(ValueError):
    """The server asked for something that the client does not do."""


class LostError(LookupError):
    """What a client held is gone, for example because its process was started anew."""


class Clients:
    """What the clients of a process hold, and the stages that they run.

    Args:
      data: what they hold at first, by client and name.
      plan: the stages that they run, from the manifest of a saved plan; None for all that the
        server sends.
      folder: where the stages of the plan are.
    """

    def __init__(
        self,
        data: dict[Any, dict[str, Any]],
        plan: dict[str, Any] | None = None,
        folder: pathlib.Path | None = None,
    ):
        if not isinstance(data, dict) or not all(isinstance(own, dict) for own in data.values()):
            raise TypeError(
                "what the function of the clients' data returned is not a dict of dicts, expected "
                "{client: {name: array}}"
            )
        self._values = {
            (client.item() if isinstance(client, np.generic) else client, str(name)): (
                x if hasattr(x, "dtype") else np.asarray(x)
            )
            for client, own in data.items()
            for name, x in own.items()
        }
        self._plan = plan
        self._data = frozenset(self._values)  # which the server cannot replace
        self._stages: dict[str, Callable] = {}
        for name, stage in (plan or {"stages": {}})["stages"].items():
            assert folder is not None
            if pathlib.Path(stage["file"]).name != stage["file"]:
                raise RefusedError(f"{stage['file']} is not a file in the plan's folder.")
            blob = (folder / stage["file"]).read_bytes()
            if hashlib.sha256(blob).hexdigest() != name:
                raise RefusedError(f"{stage['file']} is not what the plan's manifest says.")
            self._stages[name] = _loaded(blob)

    @property
    def made(self) -> dict[tuple[Any, str], Any]:
        """What the clients hold apart from their data, by client and name."""
        return {name: x for name, x in self._values.items() if name not in self._data}

    @made.setter
    def made(self, values: dict[tuple[Any, str], Any]) -> None:
        own = {name: x for name, x in self._values.items() if name in self._data}
        self._values = values | own

    def answer(self, request: dict[str, Any]) -> Any:
        """Does what the server asks for."""
        return getattr(self, f"do_{request['do']}")(**request["with"])

    def do_about(self) -> list[Any]:
        """What clients hold: name, dtype and shape."""
        return [
            [client, name, str(_as_of_jax(client, name, x).dtype), list(np.shape(x))]
            for (client, name), x in self._values.items()
        ]

    def do_put(self, clients: list[Any], slots: list[str], values: list[Any]) -> None:
        for client, slot, value in zip(clients, slots, values, strict=True):
            self._keep(client, slot, value)

    def do_fetch(self, rows: list[Any]) -> list[Any]:
        if self._plan is not None and not self._plan["fetches"]:
            raise RefusedError("the plan that this client was given fetches no rows: they stay")
        return [_as_of_jax(client, slot, self._own(client, str(slot))) for client, slot in rows]

    def do_free(self, rows: list[Any]) -> None:
        for client, slot in rows:
            if (client, slot) not in self._data:
                self._values.pop((client, slot), None)

    def do_run(
        self, stage: str, shared: list[Any], jobs: list[Any], blob: bytes | None = None
    ) -> list[list[Any]]:
        """Runs a stage for some clients, and returns what each of them sends.

        ``blob`` is the stage, if the process may not know it yet.
        ``shared`` has the values that are the same for all, and None at the others. A job is a
        client, its other operands, each of which is the name of what it holds or a value, and for
        each output the name under which it stays, or None if it is sent.
        """
        if blob is not None:
            self._learn(stage, blob)
        if stage not in self._stages:
            raise RefusedError("a stage is unknown")
        run, sent = self._stages[stage], []
        for client, own, keep in jobs:
            self._check(stage, shared, keep)
            rest = iter(own)
            operands = [self._own(client, next(rest)) if x is None else x for x in shared]
            made = run(*operands)
            for name, value in zip(keep, made, strict=True):
                if name is not None:
                    self._keep(client, name, value)
            sent.append([x for name, x in zip(keep, made, strict=True) if name is None])
        return sent

    def _learn(self, name: str, blob: bytes) -> None:
        if hashlib.sha256(blob).hexdigest() != name:
            raise RefusedError("a stage is not what its name says")
        if self._plan is not None:
            raise RefusedError("a stage is not in the plan that this client was given")
        if name not in self._stages:
            self._stages[name] = _loaded(blob)

    def _keep(self, client: Any, name: str, value: Any) -> None:
        if (client, name) in self._data:
            raise RefusedError("a client's data would be replaced")
        self._values[client, name] = value

    def _own(self, client: Any, x: Any) -> Any:
        if not isinstance(x, str):
            return x
        if (client, x) not in self._values:
            raise LostError(f"the client {client!r} has no value {x!r}, or has it no more")
        return self._values[client, x]

    def _check(self, stage: str, shared: Sequence[Any], keep: Sequence[str | None]) -> None:
        if self._plan is None:
            return
        own = [mode == "placed" for mode in self._plan["stages"][stage]["inputs"]]
        if [x is None for x in shared] != own:
            raise RefusedError("a client would get a value alone that all get in the plan")
        stays = [mode == "placed" for mode in self._plan["stages"][stage]["outputs"]]
        if [name is not None for name in keep] != stays:
            raise RefusedError("a result would be sent that stays with the client in the plan")


def _as_of_jax(client: Any, name: str, x: Any) -> Any:
    """An array in JAX's dtype. Without x64, JAX would truncate large numbers silently."""
    if isinstance(x, jax.Array):
        return x
    array = np.asarray(x)
    if array.dtype.kind not in "biufcV":
        raise RefusedError(
            f"{name!r} of the client {client!r} is {array.dtype}, expected numbers or bools"
        )
    known = {"g": np.float64, "G": np.complex128}  # JAX has none of more bits
    dtype = jax.dtypes.canonicalize_dtype(known.get(array.dtype.char, array.dtype))
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        narrow = array.astype(dtype)
    fits = (
        narrow == array if array.dtype.kind in "iu" else np.isfinite(narrow) >= np.isfinite(array)
    )
    if not fits.all():  # the numbers are not in the error, which the server reads
        raise RefusedError(
            f"{name!r} of the client {client!r} is {array.dtype}, with numbers that do not fit "
            f"{dtype}. Load smaller numbers, or set jax_enable_x64 at the server"
        )
    return narrow


def _loaded(blob: bytes) -> Callable:
    try:
        stage = export.deserialize(bytearray(blob))
        stage.mlir_module()  # fails if it is of an unknown version
        return jax.jit(stage.call)
    except Exception as error:  # JAX says in several ways that it does not know a format
        raise RefusedError(
            f"a stage cannot be loaded by jax {jax.__version__} ({error}). Save the plan with a "
            "version of JAX that is not newer, or install the one that saved it."
        ) from error


def read_plan(folder: pathlib.Path) -> dict[str, Any]:
    """The manifest of a saved plan."""
    path = folder / "plan.json"
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
        found = plan["format"]
        if found == 1:
            _ = (
                plan["fetches"],
                [(x["file"], x["inputs"], x["outputs"]) for x in plan["stages"].values()],
            )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RefusedError(f"{path} is damaged, or not that of a plan: {error!r}.") from error
    if found != 1:
        raise RefusedError(
            f"{folder} has format {found!r}, expected 1. Another version of fax saved it. Use that "
            "version here, too, or save the plan with this one."
        )
    return plan


def limit(link: Any, seconds: float) -> None:
    """Lets reading fail after so many seconds. With 0, it takes as long as it takes."""
    value = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
    with socket.socket(fileno=os.dup(link.fileno())) as own:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)


def without_delay(link: Any) -> None:
    """Lets the end of a message be sent before its beginning is confirmed, which takes 40 ms."""
    with socket.socket(fileno=os.dup(link.fileno())) as own:
        own.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def accepted(listener: connection.Listener, key: bytes) -> Any:
    """The next connection. Whoever does not prove to know the key soon is sent away.

    Raises:
      AuthenticationError, OSError, EOFError: if the key is wrong, or did not come in time.
    """
    link = listener.accept()
    try:
        without_delay(link)
        limit(link, 5.0)
        connection.deliver_challenge(link, key)
        connection.answer_challenge(link, key)
        limit(link, 0)
    except BaseException:
        link.close()
        raise
    return link


def serve(link: Any, clients: Clients) -> None:
    """Answers requests until the server stops, is gone, or sends a message that is too large."""
    while True:
        try:
            data = link.recv_bytes(LARGEST)
        except (EOFError, OSError):
            return
        number = None
        try:
            request = decode(data)
            number = _count(request["number"])
            if request["do"] == "stop":
                return
            with jax.enable_x64(bool(request.get("x64", jax.config.jax_enable_x64))):
                answer = encode({"number": number, "result": clients.answer(request)})
        except Exception as error:
            answer = encode({"number": number, "error": f"{type(error).__name__}: {error}"})
        try:
            link.send_bytes(answer)
        except OSError:  # the server is gone
            return


def load(name: str, argument: Any) -> Any:
    """Calls the function with this name. A file may import what is beside it, as a script may."""
    module, _, function = name.rpartition(":")
    if not module:
        raise ValueError(
            f"{name!r} names no function, expected MODULE:FUNCTION or FILE.py:FUNCTION"
        )
    if module.endswith(".py"):
        sys.path.insert(0, str(pathlib.Path(module).resolve().parent))
        found: Any = types.SimpleNamespace(**runpy.run_path(module, run_name="clients_data"))
    else:
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module.partition(".")[0]:
                raise
            raise ModuleNotFoundError(
                f"There is no module {module!r}. Modules of the current folder are not found: "
                f"name the file, {module.replace('.', '/')}.py:{function}, or set PYTHONPATH.",
                name=error.name,
            ) from error
    if not hasattr(found, function):
        raise AttributeError(f"{module} has no function {function!r}")
    return getattr(found, function)(argument)


def main(make: Callable[..., Clients] = Clients, arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("address", help="HOST:PORT of the server")
    parser.add_argument("--load", help="MODULE:FUNCTION or FILE.py:FUNCTION for the clients' data")
    parser.add_argument("--number", type=int, default=0, help="the number of this process")
    parser.add_argument("--plan", type=pathlib.Path, help="a folder with a saved plan")
    args = parser.parse_args(arguments)
    host, _, port = args.address.rpartition(":")
    key = sys.stdin.readline().strip().encode()
    data = load(args.load, args.number) if args.load else {}
    plan = None if args.plan is None else read_plan(args.plan)
    clients = make(data, plan, args.plan)
    with connection.Client((host, int(port)), authkey=key) as link:
        without_delay(link)
        link.send_bytes(encode({"number": args.number, "pid": os.getpid()}))
        # Ctrl-C is for the server, which may go on. The process ends with the connection.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        serve(link, clients)


if __name__ == "__main__":
    main()
