"""Hosts of clients with secure sums in this process: what is sent can be seen, changed and lost."""

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fax import deploy
from fax.deploy import _client as runtime
from fax.deploy import _hosts, _secure_client
from fax.deploy import _masks as masks

_STAGES = {}


class LocalHosts(_hosts.Hosts):
    """Each host runs `_secure_client.SecureClients`. Messages are encoded as for other processes.

    Attributes:
      hosts: the clients of each host.
      traffic: what was sent: the step, the host, the request and the answer.
      before: hosts that are gone when a step begins, and from then on, by step.
      after: hosts that take a step and whose answer does not arrive, nor any other, by step.
      request, answer: change a message, called with the step, the host, and the message.
    """

    _host, _hosts = "host", "hosts"
    _platforms = ("cpu",)

    def __init__(self, data, threshold=2 / 3, identities=None, demanded=None):
        super().__init__(None, deploy.SecureSums(threshold))
        settings = {"threshold": threshold if demanded is None else demanded}
        settings["identities"] = identities
        self.hosts = [_secure_client.SecureClients(own, **settings) for own in data]
        for host in self.hosts:
            host._stages = _STAGES  # so that each is compiled once
        self._numbers = range(len(data))
        self.traffic = []
        self.before, self.after, self.gone = {}, {}, set()
        self.request = self.answer = lambda do, host, message: message
        self._look(self._numbers)

    def put(self, clients, rows):
        made = [deploy.Row(client, next(self._slots)) for client in clients]
        for host, own in self._by_host(clients).items():
            for i in own:
                self.hosts[host].do_put([clients[i]], [made[i].slot], [rows[i]])
        return made

    def _ask(self, do, requests, read):
        step = do.removeprefix("secure_") if do.startswith("secure_") else f"plain {do}"
        self.gone |= set(self.before.get(step, ()))
        failed, enough = dict.fromkeys(self.gone & requests.keys(), "is gone"), False
        for host in requests.keys() - self.gone:
            what = self.request(step, host, runtime.decode(runtime.encode(requests[host])))
            if host in self.gone:
                failed[host] = "is gone"
                continue
            try:
                answer = self.hosts[host].answer({"do": do, "with": what})
                answer = self.answer(step, host, runtime.decode(runtime.encode(answer)))
            except Exception as error:
                failed[host] = f"failed: {type(error).__name__}: {error}"
                continue
            self.traffic.append((step, host, what, answer))
            if host in self.after.get(step, ()):
                self.gone.add(host)
                failed[host] = "did not answer in time"
                continue
            try:
                enough = read(host, answer)
            except (ValueError, TypeError) as error:
                failed[host] = f"sent what is not an answer: {error}"
            if enough:
                return
        if failed:
            raise self._failed(failed)


def identities_of(clients):
    """Keys by which clients sign: the private ones, and the public ones."""
    private = {client: masks.new_key() for client in clients}
    return private, {
        client: Ed25519PrivateKey.from_private_bytes(key).public_key().public_bytes_raw()
        for client, key in private.items()
    }
