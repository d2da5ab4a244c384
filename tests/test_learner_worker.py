"""The process of a learner on Flower, without Flower: conversations with the server."""

import socket
import threading
import time
from multiprocessing import AuthenticationError, connection

import pytest
from processes import sends_at_once

from fax.deploy import _client as runtime
from fax.deploy import _learner_worker
from fax.deploy._learner_process import _Connection, serve


class Counter:
    """A learner that counts its messages, and sends something after each of them."""

    def __init__(self):
        self.told, self.waiting = [], True

    def prepare(self, message):
        self.receive(message)

    def receive(self, message):
        self.told.append(message)
        self.waiting = message["do"] in ("settings", "wait")

    def advance(self):
        self.waiting = True
        return [len(self.told)]


@pytest.fixture
def talk():
    """A learner in a thread; tells it something in a conversation, and returns its answer."""
    mailbox, learner = _learner_worker.Mailbox(), Counter()

    def run():
        serve(mailbox, learner)
        mailbox.end()

    thread = threading.Thread(target=run)
    thread.start()

    def say(name, number, *what, hold=10.0, **others):
        messages = [{"do": do} for do in what]
        return mailbox.answer(
            {"talk": name, "number": number, "messages": messages, "hold": hold} | others
        )

    say.learner = learner
    yield say
    say("last", 0, "stop")
    thread.join(10)
    assert not thread.is_alive()


def test_errors_of_the_data_are_not_the_end_of_the_connection():
    class Broken(Counter):
        def advance(self):
            raise ConnectionError("the data's server is gone")

    own, other = connection.Pipe()
    other.send_bytes(runtime.encode({"do": "start"}))
    with pytest.raises(ConnectionError, match="the data's server"):
        serve(_Connection(own), Broken())
    other.close()
    serve(_Connection(own), Counter())  # the server is gone


def answer(*messages, waiting=True, ended=False):
    return {"messages": list(messages), "waiting": waiting, "ended": ended}


def update(what):
    return {"do": "update", "with": what}


def test_a_conversation(talk):
    """Everything arrives once and in order, and whether the learner waits is known at once."""
    for number in range(100):
        # In a new conversation, the learner prepares again.
        name, count = f"talk {number}", 4 * number
        assert talk(name, 0, "settings") == answer({"do": "join"})
        assert talk(name, 1, "welcome") == answer(update(count + 2))
        assert talk(name, 2, "wait") == answer()
        assert talk(name, 3, "land") == answer(update(count + 4))
        # It answers at once that it still waits.
        assert talk(name, 4) == answer()


def test_messages_that_are_lost_or_come_twice(talk):
    """Then the conversation is over, and nothing of it is in the next one."""
    lost = {"lost": True}
    assert talk("one", 1, "land") == lost
    assert talk("one", 0, "settings") == answer({"do": "join"})
    assert talk("one", 2, "land") == talk("two", 1, "land") == lost
    told = talk("one", 1, "welcome")
    assert told == answer(update(2))
    assert talk("one", 1, "welcome") == lost
    assert [message["do"] for message in talk.learner.told] == ["settings", "welcome"]


def test_a_learner_at_work(talk):
    """The answer comes after a while without what is not there, and later with it."""
    steps, begun, done = threading.Semaphore(0), threading.Event(), threading.Event()
    learner = talk.learner

    def advance():
        begun.set()
        steps.acquire()
        learner.waiting = True
        done.set()
        return [learner.told[-1]["do"]]

    learner.advance = advance
    talk("one", 0, "settings")
    assert talk("one", 1, "welcome", hold=0.0) == answer(waiting=False)
    begun.wait(10)
    steps.release()
    assert talk("one", 2) == answer(update("welcome"))
    # What it sends after the conversation is over is not in the next one.
    begun.clear()
    assert talk("one", 3, "land", hold=0.0) == answer(waiting=False)
    begun.wait(10)
    done.clear()
    assert talk("two", 0, "settings", hold=0.0) == answer(waiting=False)
    steps.release()
    assert talk("two", 1) == answer({"do": "join"})
    assert done.is_set()


def test_it_ends_when_it_is_told_to(talk):
    talk("one", 0, "settings")
    assert talk("one", 1, "stop") == answer(waiting=False, ended=True)


def test_errors_are_answers():
    mailbox = _learner_worker.Mailbox()

    def answered(message):
        return _learner_worker._answered(mailbox, _learner_worker.runtime.encode(message))["error"]

    assert "speaks version 0 of the protocol" in answered({"format": 0})
    assert "KeyError" in answered({"format": _learner_worker.FORMAT})
    assert "MessageError" in _learner_worker._answered(mailbox, b"nonsense")["error"]


def test_strangers_at_the_port_of_a_worker(monkeypatch):
    """One who says nothing, and one without the key, are sent away. Then the worker may wait."""
    own = runtime.limit
    monkeypatch.setattr(runtime, "limit", lambda link, seconds: own(link, seconds and 0.2))
    key = b"key"

    def speak():
        with pytest.raises(AuthenticationError):
            connection.Client(listener.address, authkey=b"another")
        with connection.Client(listener.address, authkey=key) as link:
            time.sleep(0.5)
            link.send_bytes(b"slow")

    with connection.Listener(("127.0.0.1", 0)) as listener:
        with socket.create_connection(listener.address), pytest.raises(BlockingIOError):
            runtime.accepted(listener, key)
        thread = threading.Thread(target=speak)
        thread.start()
        with pytest.raises(AuthenticationError):
            runtime.accepted(listener, key)
        with runtime.accepted(listener, key) as link:
            assert link.recv_bytes() == b"slow"
            assert sends_at_once(link)
        thread.join()
