"""Which words are frequent, from 100,000 clients with one word each: a private query on Beam.

    python examples/federated_analytics.py

The words are those of Python's standard library, and their list is not known to the server. It
finds the frequent ones letter by letter (Zhu et al., arXiv:1902.08534): the server sends the
frequent beginnings of words, and each client sends a one at the beginning that its word has and the
letter that follows. Sums with enough clients become the beginnings of the next round. Each round is
a pipeline of Apache Beam, which reads the clients from a text file.

Gaussian noise is added to the sums of each round, so that what the server publishes hardly depends
on any one client, who adds at most one to one of the sums in each of seven rounds. Epsilon, at
delta = 1e-6, is for all seven together, even if fewer turn out to be enough, and for populations
that differ in whether one client has a word. The number of clients is public. Whoever runs the
pipelines sees the clients' words, so this protects from those who see the result.

The example prints the words with their counts, and draws them to runs/federated_analytics.png, with
the true counts for comparison, which a real query would not publish. Other arguments are options of
Beam, such as --runner.
"""

import argparse
import collections
import math
import re
import tempfile
import time
from pathlib import Path

import apache_beam as beam
import jax
import jax.numpy as jnp
import numpy as np
from apache_beam.options.pipeline_options import PipelineOptions
from matplotlib.figure import Figure

import fax

LETTERS = 6  # of the longest words
BEGINNINGS = 32  # at most so many are followed
DELTA = 1e-6


def words_of_python():
    """The words in the modules of the standard library, in a random order."""
    text = "".join(
        p.read_text("utf-8") for p in sorted(Path(argparse.__file__).parent.glob("*.py"))
    )
    words = re.findall(rf"\b[a-z]{{3,{LETTERS}}}\b", text)
    return np.random.default_rng(0).permutation(words)


def parse(line):
    """A client from a line of the file: its word as numbers, 0 after the last letter."""
    name, word = line.split()
    numbers = np.zeros(LETTERS + 1, np.int32)
    numbers[: len(word)] = [ord(letter) - ord("a") + 1 for letter in word]
    return name, {"word": numbers}


def spelled(numbers):
    return "".join(chr(n - 1 + ord("a")) for n in numbers if n)


def query(clients, aggregator):
    """The program: how many clients have which letter after which beginning, with noise."""

    @fax.program(clients=clients)
    def count(beginnings, place, state, key, words):
        def client(beginnings, place, word):
            """A one, at the beginning that the word has and the letter that follows."""
            same = (beginnings == word) | (jnp.arange(LETTERS + 1) >= place)
            has = same.all(1) & (beginnings[:, 0] >= 0)
            follows = jnp.arange(27) == word[place]
            return (has[:, None] & follows).astype(jnp.float32), jnp.ones(())

        sent, ones = fax.map(client, *map(fax.broadcast, (beginnings, place)), words["word"])
        mean, state, _ = aggregator.aggregate(sent, ones, state, key)
        return mean * clients, state

    return count


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=100_000)
    parser.add_argument("--epsilon", type=float, default=1.0)
    options, others = parser.parse_known_args()

    rounds = LETTERS + 1
    noise = fax.aggregators.calibrate(options.epsilon, rounds, DELTA)
    aggregator = fax.aggregators.gaussian(clip_norm=1.0, noise_multiplier=noise)
    budget = fax.aggregators.Budget(options.epsilon, DELTA, noise)
    state = aggregator.init(jnp.zeros((BEGINNINGS, 27)))
    # In all rounds, none of the counts of what nobody has is likely to be above.
    threshold = noise * math.sqrt(2 * math.log(rounds * BEGINNINGS * 27 / 0.01))
    words = words_of_python()[: options.clients]
    clients = len(words)

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "words.txt"
        file.write_text("".join(f"client-{i} {word}\n" for i, word in enumerate(words)))
        backend = fax.deploy.Beam(
            lambda pipeline: pipeline | beam.io.ReadFromText(str(file)) | beam.Map(parse),
            clients,
            {"word": jax.ShapeDtypeStruct((LETTERS + 1,), jnp.int32)},
            options=PipelineOptions(others) if others else None,
        )
        held = backend.held()
        count = query(clients, aggregator)
        key = jax.random.key(0)
        beginnings = np.full((BEGINNINGS, LETTERS + 1), -1, np.int32)
        beginnings[0] = 0
        args = beginnings, np.int32(0), state, key, held
        plan = fax.deploy.cut(count, *args, held=["word"])
        print(plan.audit(), end="\n\n")

        found, seconds = {}, []
        for place in range(rounds):
            begin = time.perf_counter()
            args = beginnings, np.int32(place), state, jax.random.fold_in(key, place), held
            counts, state = plan.run(backend, *args)
            budget.spend(state)  # before anything depends on the counts
            seconds.append(time.perf_counter() - begin)
            frequent = [
                (float(n), (*beginnings[i, :place], letter))
                for (i, letter), n in np.ndenumerate(counts)
                if n > threshold
            ]
            found |= {spelled(own): n for n, own in frequent if own[-1] == 0}
            longer = sorted((x for x in frequent if x[1][-1]), reverse=True)[:BEGINNINGS]
            if not longer:
                break
            beginnings = np.full_like(beginnings, -1)
            for row, (_, own) in zip(beginnings, longer):
                row[:] = [*own, *[0] * (LETTERS - place)]

    true = collections.Counter(words.tolist())
    ranked = sorted(found, key=found.get, reverse=True)
    for word in ranked[:10]:
        print(f"{word:{LETTERS}}  {found[word]:9.1f} clients, in truth {true[word]}")
    print(
        f"{len(found)} words of {clients} clients, with epsilon = {budget.limit:g} at delta = "
        f"{DELTA}: noise of {noise:.1f} clients, threshold {threshold:.0f}, "
        f"{np.median(seconds):.1f} s per round"
    )
    draw(ranked[:24], found, true, budget.limit, clients)


def draw(words, found, true, epsilon, clients):
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(words))
    axes.bar(places - 0.2, [true[word] for word in words], 0.4, label="true counts")
    axes.bar(places + 0.2, [found[word] for word in words], 0.4, label="with noise")
    axes.set_xticks(places, words, rotation=60)
    axes.set_ylabel("clients")
    axes.set_title(f"Frequent words of {clients:,} clients, ε = {epsilon:g}")
    axes.legend()
    path = Path("runs/federated_analytics.png")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=150)
    print(f"Figure: {path}")


if __name__ == "__main__":
    main()
