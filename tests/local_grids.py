"""A grid of Flower without its servers: the nodes are in this process, with workers of their own.

What is sent goes through Flower's serialization, as does the state that a node keeps.
"""

import contextlib
import os
import signal

from flwr.app import Context, Error, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity


class LocalGrid:
    """A grid with a node for each configuration.

    Attributes:
      apps: each node's ClientApp.
      states: each node's ``context.state``.
      traffic: everything that was sent, serialized.
      down: the nodes that do not answer.
      slow: the nodes whose answers come when they are not in it any more.
      tamper: changes the content of a reply.
    """

    def __init__(self, app, configs):
        TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1
        self.configs = dict(enumerate(configs, 100))
        self.apps = dict.fromkeys(self.configs, app)
        self.states = {node: RecordDict() for node in self.configs}
        self.traffic = []
        self.down, self.slow = set(), set()
        self.tamper = lambda content: content
        self._replies = {}

    def get_node_ids(self):
        return list(self.configs)

    def push_messages(self, messages):
        numbers = []
        for message in messages:
            number = f"message {len(self.traffic)}"
            message.metadata.__dict__["_message_id"] = number
            message.content = self._copy(message.content)
            numbers.append(number)
            node = message.metadata.dst_node_id
            reply = None if node in self.down else self._answer(node, message)
            if reply is not None:
                self._replies[number] = node, reply
        return numbers

    def pull_messages(self, message_ids):
        """All answers that have arrived, also to other messages than those asked for."""
        assert message_ids
        arrived = {i for i, (node, _) in self._replies.items() if node not in self.slow}
        return [self._replies.pop(i)[1] for i in arrived]

    def _answer(self, node, message):
        state = self._copy(self.states[node])
        context = Context(1, node, self.configs[node], state, {})
        try:
            reply = self.apps[node](message, context)
        except Exception as error:
            reason = f"{type(error)}:<'{error}'>"
            return Message(Error(code=2, reason=reason), reply_to=message)
        finally:
            self.states[node] = self._copy(context.state)
        reply.content = self.tamper(self._copy(reply.content))
        return reply

    def _copy(self, records):
        """What the records are after Flower has sent them."""
        contents = {name: each.deflate() for name, each in get_all_nested_objects(records).items()}
        self.traffic += contents.values()
        return inflate_object_from_contents(records.object_id, contents)

    def kill_worker(self, node):
        if "fax" in self.states[node]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.states[node]["fax"]["pid"], signal.SIGKILL)

    def stop(self):
        for node in self.states:
            self.kill_worker(node)


@contextlib.contextmanager
def ending(package):
    """A list for grids. With the context, the workers that fax's files in a package started end."""
    made = []
    try:
        yield made
    finally:
        for grid in made:
            grid.stop()
        for process in package._started:
            process.wait()
