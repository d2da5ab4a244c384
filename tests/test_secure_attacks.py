"""Attacks on secure sums: what the server and some clients see, and what clients refuse."""

import contextlib
import random

import numpy as np
import pytest
from local_hosts import LocalHosts, identities_of

import fax
from fax import deploy
from fax.deploy import _client as runtime
from fax.deploy import _masks as masks
from fax.deploy import _secure_party as protocol
from fax.deploy import _shamir as shamir

SIZE, THRESHOLD = 5, 3
SESSION = bytes(range(16))
TASK = protocol.task_of("stage", [])
REFUSED = (runtime.RefusedError, masks.CryptoError, ValueError, TypeError, KeyError)


class Server:
    """A server that follows the protocol with parties in this process, as far as it is asked to.

    Attributes:
      parties: by their numbers.
      entries: the roster.
      shares: the encrypted shares, by sender and receiver.
    """

    def __init__(self, identities=None, session=SESSION, size=SIZE):
        signing, self.peers = ({}, None) if identities is None else identities
        self.session = session
        self.parties = {
            i: protocol.Party(f"client {i}", session, signing.get(f"client {i}"))
            for i in range(1, size + 1)
        }
        self.entries = [[i, f"client {i}", *p.entry] for i, p in self.parties.items()]

    def roster(self, *entries, threshold=THRESHOLD, demanded=THRESHOLD):
        (entries,) = entries or (self.entries,)
        return protocol.Roster(self.session, threshold, entries, demanded, self.peers)

    def to_shares(self):
        roster = self.roster()
        self.shares = {i: dict(party.shares(roster)) for i, party in self.parties.items()}
        return self

    def received(self, i):
        return [[j, own[i]] for j, own in self.shares.items() if j != i]

    def to_masked(self, rows):
        self.to_shares()
        self.masked = {
            i: party.mask(self.received(i), [rows[i - 1]], TASK)[0]
            for i, party in self.parties.items()
        }
        return self

    @property
    def context(self):
        return protocol.context_of_masks(self.roster().context, TASK)


ROWS = np.random.default_rng(0).integers(0, 2**32, (SIZE, 4), np.uint32)


# What is seen


@pytest.mark.parametrize("row", [np.zeros(300, np.uint32), np.full(300, 2**32 - 1, np.uint32)])
def test_a_masked_vector_is_uniform(row):
    """Whatever the row: a chi-squared test of each of its bytes, and of how two go together."""
    sent = np.stack([Server().to_masked([row] * SIZE).masked[1] for _ in range(4)])
    counts = np.bincount(sent.view(np.uint8).ravel(), minlength=256)
    expected = counts.sum() / 256
    # 255 degrees of freedom: less than 1e-9 of all runs are above.
    assert np.sum((counts - expected) ** 2 / expected) < 410
    other = np.stack(list(Server().to_masked([row] * SIZE).masked.values()))
    both = np.corrcoef((other - row).astype(float))
    assert np.abs(both - np.eye(SIZE)).max() < 0.4  # 7 standard deviations


def known_masks(server, colluding, i):
    """What the server and some clients can remove from the vector of client i after the sum."""
    words = server.masked[i].copy()
    context = server.context
    seed = server.parties[i]._seed  # which the sum's unmasking reveals
    masks.add_mask([words], masks.derive(seed, b"seed", context), -1)
    for j in colluding:  # they know what they share with i
        public = server.entries[i - 1][3]
        key = protocol.mask_key(server.parties[j]._mask, public, context, i, j)
        masks.add_mask([words], key, 1 if j < i else -1)
    return words


def test_all_but_two_learn_the_sum_of_these_two_alone():
    """The server and all others: what is left of the two is their rows, plus and minus a mask.

    Any other rows with the same sum explain the same: with the mask that makes the difference. The
    mask is the expansion of a key that two private keys give, of which there are fewer shares than
    the threshold, and these fit every private key.
    """
    server = Server().to_masked(ROWS)
    colluding = [3, 4, 5][: THRESHOLD - 1]
    honest = [i for i in server.parties if i not in colluding]
    left = {i: known_masks(server, colluding, i) for i in honest}
    np.testing.assert_array_equal(
        np.sum(list(left.values()), axis=0, dtype=np.uint32),
        ROWS[[i - 1 for i in honest]].sum(0, dtype=np.uint32),
    )
    assert not any(np.any(left[i] == ROWS[i - 1]) for i in honest)
    # What the colluding clients can decrypt of the secret key of an honest one.
    one = honest[0]
    shares = {}
    for j in colluding:
        channel = server.parties[j]._channel_to(one)
        ends = protocol._ends(one, j)
        shares[j] = masks.decrypt(channel, server.shares[one][j], ends)[: shamir.SHARE]
    for secret in (bytes(32), bytes(range(32)), server.parties[one]._mask):
        explained = explaining(shares, secret)
        assert shamir.join(list(explained), [[x] for x in explained.values()]) == [secret]


def explaining(shares, secret):
    """The shares, and one more, that together give any secret."""
    points, new = list(shares), 1 + max(shares)
    columns = []
    for start in range(0, shamir.SHARE, 4):
        k = start // 2
        values = [int.from_bytes(secret[k : k + 2], "little")]
        values += [int.from_bytes(shares[j][start : start + 4], "little") for j in points]
        total, at = 0, [0, *points]
        for x, value in zip(at, values, strict=True):
            for other in at:
                if other != x:
                    value = value * (new - other) * pow(x - other, -1, shamir.PRIME) % shamir.PRIME
            total += value
        columns.append((total % shamir.PRIME).to_bytes(4, "little"))
    return {**shares, new: b"".join(columns)}


def test_a_late_answer_is_not_unmasked():
    """Of a client that failed, the shared masks are revealed. Its own mask remains."""
    server = Server().to_masked(ROWS)
    words = server.masked[1].copy()
    for j in range(2, SIZE + 1):
        public = server.entries[j - 1][3]
        key = protocol.mask_key(server.parties[1]._mask, public, server.context, 1, j)
        masks.add_mask([words], key, -1)
    assert not np.any(words == ROWS[0])
    masks.add_mask([words], masks.derive(server.parties[1]._seed, b"seed", server.context), -1)
    np.testing.assert_array_equal(words, ROWS[0])


# What a client refuses


def refuses(step, *args):
    with pytest.raises(REFUSED):
        step(*args)


def test_never_both_kinds_of_shares():
    """A client is told once who is present, and reveals one share of each, however often asked."""
    server = Server().to_masked(ROWS)
    party = server.parties[1]
    found = party.unmask([1, 2, 3], [])
    assert [number for number, _ in found] == [1, 2, 3, 4, 5]
    for present in ([1, 2, 3], [1, 4, 5], [1, 2, 3, 4, 5]):
        refuses(party.unmask, present, [])
    assert not hasattr(party, "_shares")
    # The shares are of seeds, and of mask keys for those who failed.
    others = {j: server.parties[j].unmask([1, 2, 3], []) for j in (2, 3)}
    secrets = shamir.join([1, 2, 3], [[x for _, x in row] for row in (found, *others.values())])
    for i, secret in enumerate(secrets, 1):
        kept = server.parties[i]
        assert secret == (server.parties[i]._mask if i > 3 else secret)
        if i <= 3:
            assert masks.commitment(secret) == server.entries[i - 1][4]
        else:
            assert secret != kept._seed


def test_one_vector_is_masked_once():
    server = Server().to_masked(ROWS)
    refuses(server.parties[1].mask, server.received(1), [ROWS[0]], TASK)
    refuses(server.parties[1].mask, server.received(1), [ROWS[1]], TASK)


@pytest.mark.parametrize(
    "present",
    [
        [1, 2],
        [2, 3, 4],
        [1, 2, 3, 3],
        [1, 1, 1],
        [1, 2, 6],
        [0, 1, 2],
        [],
        [1, 2, "3"],
        None,
    ],
)
def test_who_is_said_to_be_present(present):
    party = Server().to_masked(ROWS).parties[1]
    refuses(party.unmask, present, [])
    refuses(party.unmask, [1, 2, 3], [])  # it takes no further step


def test_steps_out_of_order():
    server = Server()
    party = server.parties[1]
    refuses(party.mask, [], [ROWS[0]], TASK)
    refuses(party.unmask, [1, 2, 3], [])
    refuses(party.sign, [1, 2, 3])
    server.to_shares()
    refuses(party.shares, server.roster())
    refuses(party.unmask, [1, 2, 3], [])
    party.mask(server.received(1), [ROWS[0]], TASK)
    refuses(party.sign, [1, 2, 3])  # it has no identity


def changed(data):
    return data[:5] + bytes([data[5] ^ 1]) + data[6:]


def of_an_earlier_sum(server, i):
    return Server(session=server.session).to_shares().received(i)


@pytest.mark.parametrize(
    "change",
    [
        lambda server, own: [[own[0][0], changed(own[0][1])], *own[1:]],
        lambda server, own: [[own[0][0], own[1][1]], [own[1][0], own[0][1]], *own[2:]],
        lambda server, own: [[own[0][0], server.shares[own[0][0]][3]], *own[1:]],
        lambda server, own: [[own[0][0], server.shares[1][own[0][0]]], *own[1:]],
        lambda server, own: [own[0], *own],
        lambda server, own: [[6, own[0][1]], *own],
        lambda server, own: [[1, own[0][1]], *own],
        lambda server, own: own[: THRESHOLD - 2],
        lambda server, own: [],
        lambda server, own: of_an_earlier_sum(server, 1),
        lambda server, own: [[own[0][0], b""], *own[1:]],
        lambda server, own: [[own[0][0], None], *own[1:]],
    ],
    ids=[
        *("changed", "swapped", "another's", "its own", "twice", "unknown", "from itself"),
        *("too few", "none", "replayed", "empty", "nothing"),
    ],
)
def test_shares_that_were_changed(change):
    server = Server().to_shares()
    party = server.parties[1]
    refuses(party.mask, change(server, server.received(1)), [ROWS[0]], TASK)
    refuses(party.mask, server.received(1), [ROWS[0]], TASK)


def with_entry(server, i, **changes):
    names = ["number", "client", "channel", "mask", "commitment", "signature"]
    entries = [list(entry) for entry in server.entries]
    for name, value in changes.items():
        entries[i - 1][names.index(name)] = value
    return entries


KEY = masks.public_key(bytes(range(32)))
ENTRIES = {
    "one client": lambda server: server.entries[:1],
    "nobody": lambda server: [],
    "fewer than the threshold": lambda server: server.entries[:2],
    "more than twice the threshold": lambda server: [
        *server.entries,
        [6, "six", KEY, KEY[::-1], KEY, None],
    ],
    "a number twice": lambda server: with_entry(server, 2, number=3),
    "zero": lambda server: with_entry(server, 2, number=0),
    "a large number": lambda server: with_entry(server, 2, number=2**31),
    "a name twice": lambda server: with_entry(server, 2, client="client 3"),
    "a key twice": lambda server: with_entry(server, 2, mask=server.entries[2][3]),
    "another's key": lambda server: with_entry(server, 2, mask=server.entries[2][2]),
    "a short key": lambda server: with_entry(server, 2, channel=KEY[:-1]),
    "no key": lambda server: with_entry(server, 2, channel=None),
    "a key that is a number": lambda server: with_entry(server, 2, channel=32),
    "a key of all zeros": lambda server: with_entry(server, 2, channel=bytes(32)),
    "its own channel replaced": lambda server: with_entry(server, 1, channel=KEY),
    "its own mask key replaced": lambda server: with_entry(server, 1, mask=KEY),
    "its own commitment replaced": lambda server: with_entry(server, 1, commitment=KEY),
    "without itself": lambda server: with_entry(server, 1, client="somebody"),
    "too short an entry": lambda server: [server.entries[0][:4], *server.entries[1:]],
    "no list": lambda server: 5,
}


@pytest.mark.parametrize("which", ENTRIES)
def test_wrong_rosters(which):
    server = Server()
    with pytest.raises(REFUSED):
        server.parties[1].shares(server.roster(ENTRIES[which](server)))


@pytest.mark.parametrize("threshold", [0, 1, 2, 6, -3, 2.5, "3", None])
def test_wrong_thresholds(threshold):
    with pytest.raises(REFUSED):
        Server().roster(threshold=threshold)


def test_a_client_demands_its_own_threshold():
    assert Server().roster(threshold=4, demanded=2 / 3).threshold == 4
    for demanded in (2 / 3, 4):
        with pytest.raises(runtime.RefusedError, match="threshold is 3 of 5 clients"):
            Server().roster(demanded=demanded)


# If clients sign


def signing_server(**settings):
    identities = identities_of([f"client {i}" for i in range(1, SIZE + 1)])
    return Server(identities, **settings)


def test_keys_that_the_server_replaces_are_refused():
    server = signing_server()
    assert server.roster()
    other = protocol.Party("client 2", SESSION, bytes(range(32)))
    forged = with_entry(
        server, 2, **dict(zip(["channel", "mask", "commitment", "signature"], other.entry))
    )
    wrong = [
        forged,
        with_entry(server, 2, channel=KEY),
        with_entry(server, 2, mask=KEY),
        with_entry(server, 2, commitment=KEY),
        with_entry(server, 2, signature=None),
        with_entry(server, 2, signature=bytes(64)),
        with_entry(server, 2, signature=server.entries[2][5]),
        with_entry(server, 2, client="stranger"),
        Server().entries,  # nobody signs
    ]
    for entries in wrong:
        with pytest.raises(REFUSED):
            server.roster(entries)
    server.session = bytes(16)  # signed for another sum
    with pytest.raises(REFUSED):
        server.roster()


def test_clients_that_are_told_different_things_about_who_is_present():
    """With less than the threshold of signatures of the same, nobody reveals anything."""
    server = signing_server().to_masked(ROWS)
    one, other = [1, 2, 3], [3, 4, 5]
    signed = {i: server.parties[i].sign(one) for i in (1, 2)}
    signed |= {i: server.parties[i].sign(other) for i in (3, 4, 5)}
    every = [[i, signature] for i, signature in signed.items()]
    party = server.parties[1]
    for signatures in (every[:2], [*every[:2], [3, signed[1]]], [every[0]] * 3, every[:3], every):
        fresh = signing_server().to_masked(ROWS)
        fresh.parties[1].sign(one)
        refuses(fresh.parties[1].unmask, one, signatures)
    refuses(party.unmask, one, every[:3])
    refuses(server.parties[3].unmask, one, every[2:])  # not what it has signed
    assert server.parties[4].unmask(other, every[2:])
    refuses(server.parties[5].sign, one)


def test_signatures_of_another_sum():
    server = signing_server().to_masked(ROWS)
    present = [1, 2, 3]
    signatures = [[i, server.parties[i].sign(present)] for i in present]
    again = signing_server().to_masked(ROWS)
    again.peers, again.parties[1]._roster.peers = server.peers, server.peers
    again.parties[1].sign(present)
    refuses(again.parties[1].unmask, present, signatures)
    assert server.parties[1].unmask(present, signatures)


def test_a_client_that_passes_off_anothers_key_as_its_own():
    """X25519 ignores the highest bit, so it can sign client 1's key as a different one.

    Client 2 then agrees with both on one secret, adds one mask and subtracts the other. If these
    were the same, its own mask, which is revealed, would be all that hides its row.
    """
    identities = identities_of([f"client {i}" for i in range(1, 4)])
    server = Server(identities, size=3)
    colluding, public = server.parties[3], server.entries[0][3]
    colluding._keys[1] = public[:-1] + bytes([public[-1] ^ 128])
    about = protocol.about_keys(SESSION, "client 3", colluding._keys)
    signature = masks.sign(identities[0]["client 3"], about)
    server.entries[2] = [3, "client 3", *colluding._keys, signature]
    server.to_masked(ROWS)
    words, seed = server.masked[2].copy(), server.parties[2]._seed
    masks.add_mask([words], masks.derive(seed, b"seed", server.context), -1)
    assert not np.any(words == ROWS[1])


# Servers and clients that change what is sent


@fax.program(clients=4)
def scaled(scale, rows):
    return fax.sum(fax.map(lambda s, x: s * x, fax.broadcast(scale), rows["x"]))


X = np.random.default_rng(1).integers(-9, 9, (4, 3))
PLAN = deploy.cut(scaled, 1, {"x": X}, held=["x"])


def hosts(**settings):
    return LocalHosts([{i: {"x": x}} for i, x in enumerate(X)], **settings)


def test_a_server_that_sends_clients_different_models():
    """One gets 1 and the others 0, so that the sum is its row. The masks do not cancel then."""
    backend = hosts()

    def inconsistent(step, host, message):
        if step == "run":
            message["shared"] = [np.int64(host == 2), *message["shared"][1:]]
        return message

    backend.request = inconsistent
    found = np.asarray(PLAN.run(backend, np.int64(1), backend.held()))
    assert not np.any(found == X[2])
    assert np.all(np.abs(found) > 100)


def test_a_server_that_sends_clients_different_models_as_their_own(tmp_path, monkeypatch):
    """Masks do not depend on what a client alone gets. So this works, except in a saved plan."""
    task_of = protocol.task_of

    def inconsistent(step, host, message):
        if step == "run":
            ((client, own, keep),) = message["jobs"]
            assert PLAN.stages[0].inputs == ("server", "placed")
            message["shared"] = [None, None]
            message["jobs"] = [[client, [np.int64(host == 2), *own], keep]]
        return message

    backend = hosts()
    backend.request = inconsistent
    with monkeypatch.context() as changes:  # the server's masks are those of what it has sent
        changes.setattr(protocol, "task_of", lambda stage, shared: task_of(stage, [None, None]))
        np.testing.assert_array_equal(PLAN.run(backend, np.int64(1), backend.held()), X[2])
    PLAN.save(tmp_path / "plan", ["cpu"])
    backend = hosts()
    backend._saved = {PLAN.stages[0].digest: PLAN.stages[0].artifact(["cpu"])[0]}
    for host in backend.hosts:
        host._plan = runtime.read_plan(tmp_path / "plan")
    np.testing.assert_array_equal(PLAN.run(backend, np.int64(1), backend.held()), X.sum(0))
    backend.request = inconsistent
    with pytest.raises(deploy.ClientError, match="alone that all get in the plan"):
        PLAN.run(backend, np.int64(1), backend.held())


def test_a_server_that_puts_zeros_in_place_of_data():
    """The sum is then one client's row: what the documentation says is not covered."""
    backend = hosts()
    zeros = backend.put(range(4), [np.zeros_like(x) for x in X])

    def replaced(step, host, message):
        if step == "run" and host != 2:
            ((client, _, keep),) = message["jobs"]
            message["jobs"] = [[client, [zeros[host].slot], keep]]
        return message

    backend.request = replaced
    np.testing.assert_array_equal(PLAN.run(backend, np.int64(1), backend.held()), X[2])


def test_a_server_that_asks_for_other_things():
    backend = hosts()
    PLAN.run(backend, 2, backend.held())
    host = backend.hosts[0]
    requests = {step: what for step, number, what, _ in backend.traffic if number == 0}
    for step, what in requests.items():  # all of them once more, in any order
        if not step.startswith("plain"):
            refuses(host.answer, {"do": f"secure_{step}", "with": what})
    run = {name: requests["run"][name] for name in ("stage", "shared", "jobs")}
    refuses(host.answer, {"do": "run", "with": run})
    refuses(host.answer, {"do": "fetch", "with": {"rows": [[0, "x"]]}})
    session = {"session": bytes(range(16))}
    host.answer({"do": "secure_keys", "with": session | {"clients": [0]}})
    for step in ("shares", "run", "unmask"):  # of the earlier sum
        refuses(host.answer, {"do": f"secure_{step}", "with": requests[step]})
    refuses(host.answer, {"do": "secure_keys", "with": session | {"clients": [0]}})
    refuses(host.answer, {"do": "secure_keys", "with": {"session": b"", "clients": [0]}})


def mutated(value, rng):
    """The value with one of its parts changed."""
    if isinstance(value, list) and value:
        at = rng.randrange(len(value))
        match rng.randrange(4):
            case 0:
                return value[:at] + value[at + 1 :]
            case 1:
                return [*value, value[at]]
            case _:
                return [*value[:at], mutated(value[at], rng), *value[at + 1 :]]
    if isinstance(value, bytes) and value:
        at = rng.randrange(len(value))
        return rng.choice(
            [value[:at] + bytes([value[at] ^ 1 << rng.randrange(8)]) + value[at + 1 :], value[:at]]
        )
    return rng.choice([None, "text", -1, 2**40, 0.5, b"bytes", [], {}])


def one_sum(backend):
    """Who is in the sum, and the sum."""
    (stage,) = PLAN.stages
    clients = range(4)
    rows = [deploy.Row(i, "x") for i in clients]
    operands = [np.int64(1) if mode == "server" else rows for mode in stage.inputs]
    present, (total,) = backend.gather(stage, clients, operands, 4, 3)
    return present, total


@pytest.mark.parametrize("step", ["keys", "shares", "unmask"])
def test_clients_that_answer_anything(step):
    """The sum is right for those who are in it, or there is an error."""
    rng, right = random.Random(0), 0

    def one_of_them(at, host, message):
        return mutated(message, rng) if at == step and host == 1 else message

    for _ in range(50):
        backend = hosts(threshold=3)
        backend.answer = one_of_them
        try:
            present, found = one_sum(backend)
        except deploy.ClientError:
            continue
        np.testing.assert_array_equal(found, X[present].sum(0))
        right += 1
    assert right > 5


@pytest.mark.parametrize("step", ["keys", "shares", "run", "unmask"])
def test_servers_that_ask_anything(step):
    """A client refuses, or sends what is masked, and one share for each of the clients."""
    rng, unmasked = random.Random(0), 0

    def changing(at, host, message):
        if at == step and host == 1:
            name = rng.choice(list(message))
            message[name] = mutated(message[name], rng)
        return message

    for _ in range(50):
        backend = hosts(threshold=3)
        backend.request = changing
        with contextlib.suppress(deploy.ClientError):
            one_sum(backend)
        answers = [(at, answer) for at, host, _, answer in backend.traffic if host == 1]
        assert len({at for at, _ in answers}) == len(answers)  # none of them twice
        for at, answer in answers:
            if at == "run" and answer and X[1].shape == answer[0][0].shape:
                assert np.abs(answer[0][0].astype(np.int64)).max() > 1000
        for at, _, _, answer in backend.traffic:
            if at == "unmask" and answer:  # one share for each client, of its seed or its key
                (revealed,) = answer
                numbers, shares = zip(*revealed, strict=True)
                assert len(set(numbers)) == len(numbers) <= 4
                assert {len(share) for share in shares} == {shamir.SHARE}
                unmasked += 1
    assert unmasked > 5


@pytest.mark.parametrize("fails", [False, True])
def test_a_client_that_changes_its_share(fails):
    """Of a seed, or of the mask key of one that failed: there is an error, not a wrong sum."""
    backend = hosts(threshold=3)
    backend.after["run"] = {3} if fails else set()

    def lying(at, host, message):
        if at == "unmask" and host == 1:
            number, share = message[0][-fails]
            message[0][-fails] = [number, changed(share)]
        return message

    backend.answer = lying
    with pytest.raises(deploy.ClientError, match="secure sum cannot be unmasked"):
        one_sum(backend)
