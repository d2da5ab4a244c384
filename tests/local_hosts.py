"""Hosts of clients with secure sums in this process: what is sent can be seen, changed and lost."""

from fax import deploy
from fax.deploy import _client as runtime
from fax.deploy import _hosts, _secure_client


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
        demanded = threshold if demanded is None else demanded
        self.hosts = [
            _secure_client.SecureClients(own, threshold=demanded, identities=identities)
            for own in data
        ]
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
        step = do.removeprefix("secure_")
        self.gone |= set(self.before.get(step, ()))
        failed, enough = dict.fromkeys(self.gone & requests.keys(), "is gone"), False
        for host in requests.keys() - self.gone:
            what = self.request(step, host, runtime.decode(runtime.encode(requests[host])))
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
