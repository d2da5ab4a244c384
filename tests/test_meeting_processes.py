"""Processes that are killed or stopped, before and after they have met."""

import json
import re
import subprocess
import sys
import textwrap

import pytest
from processes import ENV, free_ports

from fax.sharding import _peers

PROCESSES = """
    import json, os, random, signal, sys, time
    from fax.sharding import _peers

    HEARTBEAT = 2.0  # seconds
    KILL, STOP = signal.SIGKILL, signal.SIGSTOP

    class Process:
        "One of three, which meets the others and watches them then, as if JAX were being set up."

        def __init__(self, port, me, start=100, forks=False):
            self.me = me
            listen, told = os.pipe()
            self.pid = os.fork()
            if not self.pid:
                os.dup2(told, 2)
                try:
                    watch = _peers.meet(f"127.0.0.1:{port}", 3, me, start, heartbeat=HEARTBEAT)
                    watch.start()
                    os.write(2, b"met\\n")
                    if forks and not os.fork():  # a worker that outlives it
                        os.close(told)
                        os.close(2)
                        os.close(1)
                        time.sleep(20)
                        os._exit(0)
                    time.sleep(start)
                except RuntimeError as error:
                    os.write(2, f"{error}\\n".encode())
                os._exit(1)
            os.close(told)
            self.output = os.fdopen(listen)

        def met(self):
            assert self.output.readline() == "met\\n"

        def send(self, number):
            os.kill(self.pid, number)

        def end(self):
            "How it ended, and what it said."
            with self.output:
                said = self.output.read()
            return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]), said

        def kill(self):
            os.kill(self.pid, KILL)
            self.end()

    def three(port, *, victim, number, met, again=False, forks=False):
        "Something happens to one of three, before or after they have met; in three steps."
        others = [i for i in range(3) if i != victim]
        late = others.pop() if not met else None
        processes = {i: Process(port, i, forks=forks) for i in [victim, *others]}
        if met:
            for process in processes.values():
                process.met()
        yield
        hit = processes.pop(victim)
        hit.send(number)
        if again:
            hit.end()
            processes |= {i: Process(port, i) for i in (victim, late)}
            for process in processes.values():
                process.met()
            for process in processes.values():
                process.kill()
        yield
        if again:
            yield "all met"
            return
        ends = {i: process.end() for i, process in processes.items()}
        hit.send(signal.SIGCONT if number == STOP else KILL)
        ends["victim"] = hit.end()
        yield ends

    def at_once(*steps):
        for step in steps:
            next(step)
        time.sleep(0.5)  # so that those who are there know each other
        for step in steps:
            next(step)
        return [next(step) for step in steps]

    def at_random(*ports):
        "One of three is killed at a random moment, before, while or after they meet."
        found = []
        for seed, port in enumerate(ports):
            rng = random.Random(seed)
            processes = {i: Process(port, i, 5) for i in rng.sample(range(3), 3)}
            time.sleep(rng.uniform(0, 0.3))
            victim = processes.pop(rng.randrange(3))
            victim.kill()
            found.append((victim.me, processes.values()))
        return [(victim, [process.end() for process in others]) for victim, others in found]

    print(json.dumps(eval(sys.argv[1])))
"""


def happened(call):
    command = [sys.executable, "-c", textwrap.dedent(PROCESSES), call]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_processes_that_die_or_stand_still_are_named_and_may_come_back():
    """Each within two seconds, of the hundred that they would wait otherwise."""
    silent = "is not responding: it "
    died = "died before all processes had connected, and was not restarted"
    cases = [
        (
            {"victim": 1, "number": "KILL", "met": False},
            rf"process 1 on \S+ {died} within 2 s",
        ),
        (
            {"victim": 0, "number": "KILL", "met": False},
            rf"process 0 at \S+ {died} within 2 s",
        ),
        ({"victim": 1, "number": "STOP", "met": False}, rf"process 1 on \S+ {silent}has not ans"),
        ({"victim": 0, "number": "STOP", "met": False}, rf"process 0 at \S+ {silent}has sent not"),
        ({"victim": 1, "number": "KILL", "met": True}, r"fax: process 1 on \S+ died"),
        (
            {"victim": 1, "number": "KILL", "met": True, "forks": True},
            r"fax: process 1 on \S+ died",
        ),
        ({"victim": 0, "number": "KILL", "met": True}, r"fax: process 0 died"),
        ({"victim": 1, "number": "STOP", "met": True}, rf"fax: process 1 on \S+ {silent}sent no h"),
        (
            {"victim": 0, "number": "STOP", "met": True},
            rf"fax: process 0 {silent}sent no heartbeat",
        ),
    ]
    calls = [
        *(case for case, _ in cases),
        {"victim": 1, "number": "KILL", "met": False, "again": True},
        {"victim": 0, "number": "KILL", "met": False, "again": True},
    ]
    texts = [
        ", ".join(f"{k}={v}" for k, v in {"port": port, **call}.items())
        for port, call in zip(free_ports(len(calls)), calls, strict=True)
    ]
    *found, one, another = happened(f"at_once({', '.join(f'three({text})' for text in texts)})")
    assert one == another == "all met"
    for (case, message), ends in zip(cases, found, strict=True):
        status, said = ends.pop("victim")
        if case["number"] == "STOP":  # and went on in the end
            assert status == (_peers.EXIT_PEER_LOST if case["met"] else 1)
            assert re.search("did not run|not responding|stopped responding", said), (case, said)
        assert len(ends) == 1 + case["met"]
        for status, said in ends.values():
            assert status == (_peers.EXIT_PEER_LOST if case["met"] else 1)
            assert re.search(message, said), (case, said)
            others = f"process [^{case['victim']}] .*(died|responding)"
            assert not re.search(others, said), (case, said)


@pytest.mark.long
def test_killed_at_random_moments():
    for victim, ends in happened(f"at_random({', '.join(map(str, free_ports(5)))})"):
        for status, said in ends:
            assert status in (1, _peers.EXIT_PEER_LOST)
            absent = f"process {victim} did not connect|not connect to process {victim} "
            assert re.search(f"process {victim} .*died|{absent}", said), said
            assert not re.search(f"process [^{victim}] .*died", said), said
