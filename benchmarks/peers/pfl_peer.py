"""Apple's pfl 0.6 on PyTorch, with a thread for each core."""

from __future__ import annotations

import time

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.hyperparam.base import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from torch import nn

from peers import harness, workloads


class Network(nn.Module):
    """The model of a workload, with the loss that pfl calls for every batch."""

    def __init__(self, workload: workloads.Workload):
        super().__init__()
        initial = workloads.initial(workload)
        self.shapes = workload.layers
        self.convolutional = workload.convolutional
        self.layers = nn.ModuleList(
            nn.Conv2d(*shape[2:], shape[:2]) if len(shape) == 4 else nn.Linear(*shape)
            for shape in workload.layers
        )
        with torch.no_grad():
            for layer, values in zip(self.layers, initial, strict=True):
                layer.weight.copy_(torch.from_numpy(self.turned(values["w"], to_torch=True)))
                layer.bias.zero_()
        self.steps = 0

    def forward(self, x):
        x = x.view(-1, 1, workloads.SIDE, workloads.SIDE) if self.convolutional else x
        for i, layer in enumerate(self.layers):
            last = i == len(self.layers) - 1
            if isinstance(layer, nn.Conv2d):
                x = torch.relu(layer(x))
                if not isinstance(self.layers[i + 1], nn.Conv2d):
                    x = nn.functional.max_pool2d(x, 2)
                    x = nn.functional.dropout(x, workloads.DROPOUT[0], self.training).flatten(1)
            elif last:
                if self.convolutional:
                    x = nn.functional.dropout(x, workloads.DROPOUT[1], self.training)
                x = layer(x)
            else:
                x = torch.relu(layer(x))
        return x

    def loss(self, x, y, train=False):
        self.train(train)
        self.steps += train
        return nn.functional.cross_entropy(self(x), y)

    def metrics(self, x, y, eval=True):
        return {"loss": Weighted(float(self.loss(x, y)) * len(y), len(y))}

    def turned(self, weight: np.ndarray, to_torch: bool) -> np.ndarray:
        """Converts a weight to PyTorch's order of axes, channels first, or back."""
        if weight.ndim == 4:
            return weight.transpose(3, 2, 0, 1) if to_torch else weight.transpose(2, 3, 1, 0)
        after_pooling = self.convolutional and 9216 in weight.shape
        if to_torch:
            if after_pooling:
                weight = weight.reshape(12, 12, 64, -1).transpose(2, 0, 1, 3).reshape(9216, -1)
            return np.ascontiguousarray(weight.T)
        weight = weight.T
        if after_pooling:
            weight = weight.reshape(64, 12, 12, -1).transpose(1, 2, 0, 3).reshape(9216, -1)
        return weight

    def params(self) -> workloads.Params:
        return [
            {
                "w": self.turned(layer.weight.detach().numpy(), to_torch=False),
                "b": layer.bias.detach().numpy(),
            }
            for layer in self.layers
        ]


class Clock(TrainingProcessCallback):
    """Times rounds, and reports their cohorts and steps."""

    def __init__(self, report: harness.Report, network: Network, visited: list[int]):
        self.report, self.network, self.visited = report, network, visited

    def on_train_begin(self, *, model):
        self.started = time.perf_counter()
        return Metrics()

    def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
        self.report.done(time.perf_counter() - self.started, self.network.params)
        self.report.cohort(self.visited, self.network.steps)
        self.visited.clear()
        self.network.steps = 0
        self.started = time.perf_counter()
        return False, Metrics()


def main() -> None:
    chosen = harness.options(["torch"])
    report = harness.Report(chosen, ["pfl", "torch", "numpy"])
    torch.set_num_threads(harness.CORES)
    torch.manual_seed(0)
    report.load()
    count = chosen.workload.clients
    drawn = ((n, int(c)) for n in range(chosen.total) for c in workloads.cohort(n, count))
    visited: list[int] = []

    def dataset(number_and_client: tuple[int, int]) -> PyTorchTensorDataset:
        client = number_and_client[1]
        visited.append(client)
        order = workloads.epoch_order(*number_and_client)  # pfl does not shuffle
        x, y = workloads.examples(client)
        tensors = (torch.from_numpy(x[order]), torch.from_numpy(y[order]).long())
        return PyTorchTensorDataset(tensors, user_id=str(client), train_kwargs={"train": True})

    data = FederatedDataset(dataset, lambda: next(drawn))
    network = Network(chosen.workload)
    adam = torch.optim.Adam(
        network.parameters(),
        lr=workloads.SERVER_RATE,
        betas=(workloads.SERVER_B1, workloads.SERVER_B2),
        eps=workloads.SERVER_EPS,
    )
    model = PyTorchModel(network, torch.optim.SGD, adam)
    backend = SimulatedBackend(
        training_data=data, val_data=data, postprocessors=[WeightByDatapoints()]
    )
    algorithm = FederatedAveraging()
    algorithm._current_central_iteration = 1  # iteration 0 would evaluate
    report.start()
    algorithm.run(
        NNAlgorithmParams(
            central_num_iterations=chosen.total + 1,
            evaluation_frequency=10**9,
            train_cohort_size=count,
            val_cohort_size=None,
        ),
        backend,
        model,
        NNTrainHyperParams(
            local_batch_size=workloads.BATCH,
            local_num_epochs=1,
            local_learning_rate=workloads.CLIENT_RATE,
        ),
        NNEvalHyperParams(local_batch_size=None),
        callbacks=[Clock(report, network, visited)],
        send_metrics_to_platform=False,
    )
    report.finish()


if __name__ == "__main__":
    main()
