"""One training in every trainer and as plain lean steps: batches of four, two to an optimizer step, four steps."""

import itertools

import torch
from accelerate import Accelerator
from lightning.pytorch import Trainer
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import TrainingArguments

import tiny
import unloaf
from unloaf.integrations.lightning import MethodModule
from unloaf.integrations.timm import MethodTask
from unloaf.integrations.transformers import MethodTrainer

STEPS, ACCUMULATED, BATCH = 4, 2, 4
LR, MOMENTUM = 0.1, 0.9


def network():
    torch.manual_seed(0)
    return tiny.TinyNetwork(dropout=0.0).double()


def stages_of(model):
    return unloaf.find_stages(model, torch.zeros(2, 1, 8, 8, dtype=torch.float64))


def examples(ranks=1, steps=STEPS):
    """As the trainers' data sets have them."""
    count = steps * ACCUMULATED * BATCH * ranks
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 1, 8, 8, generator=generator, dtype=torch.float64)
    return [{"x": image, "labels": index % 3} for index, image in enumerate(x)]


def batches(rank=0, ranks=1, steps=STEPS):
    """Of a rank; every second batch where there are two."""
    loader = DataLoader(examples(ranks, steps), batch_size=BATCH)
    return [(batch["x"], batch["labels"]) for batch in itertools.islice(loader, rank, None, ranks)]


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=LR, momentum=MOMENTUM)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def plain(methods, steps=STEPS):
    """`method.backward` for each rank's batches in turn, all adding to the gradients of one model."""
    model, ranks = methods[0].model, len(methods)
    optimizer, found = sgd(model.parameters()), [batches(rank, ranks, steps) for rank in range(ranks)]
    for step in range(steps):
        optimizer.zero_grad()
        for index in range(step * ACCUMULATED, (step + 1) * ACCUMULATED):
            for rank, method in enumerate(methods):
                method.backward(*found[rank][index], loss_scale=1 / ACCUMULATED / ranks)
        optimizer.step()


def arguments(folder, **options):
    usual = {
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": ACCUMULATED,
        "max_steps": STEPS,
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_strategy": "no",
    }
    return TrainingArguments(str(folder), **usual | options)


def method_trainer(method, folder, ranks=1, *, data=None, **options):
    optimizers = (sgd(method.model.parameters()), None)
    data = data if data is not None else examples(ranks)
    return MethodTrainer(method=method, args=arguments(folder, **options), train_dataset=data, optimizers=optimizers)


def in_transformers(method, folder, rank=0, ranks=1):
    method_trainer(method, folder, ranks).train()


def lightning_trainer(folder, **options):
    usual = {
        "accumulate_grad_batches": ACCUMULATED,
        "max_epochs": 1,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
        "use_distributed_sampler": False,
    }
    return Trainer(**usual | options)


def in_lightning(method, folder, rank=0, ranks=1, **options):
    found = batches(rank, ranks)
    loaders = DataLoader(found, batch_size=None), DataLoader(found[:1], batch_size=None)
    lightning_trainer(folder, devices=ranks, **options).fit(MethodModule(method, optimizer=sgd), *loaders)


def in_timm(method, folder, rank=0, ranks=1):
    task = MethodTask(method)
    if ranks > 1:
        task.prepare_distributed(broadcast_buffers=False)
    optimizer = sgd(task.parameters())
    for index, (x, y) in enumerate(batches(rank, ranks)):
        last = (index + 1) % ACCUMULATED == 0
        if last:
            (task(x, y)["loss"] / ACCUMULATED).backward()
            optimizer.step()
            optimizer.zero_grad()
        else:
            with task.no_sync():
                (task(x, y)["loss"] / ACCUMULATED).backward()


def in_accelerate(method, folder, rank=0, ranks=1):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATED)
    method.model, optimizer = accelerator.prepare(method.model, sgd(method.model.parameters()))
    assert isinstance(method.model, DistributedDataParallel) == (ranks > 1)
    for x, y in batches(rank, ranks):
        with accelerator.accumulate(method.model):
            accelerator.backward(method(x, y, lean=True).loss)
            optimizer.step()
            optimizer.zero_grad()


TRAINERS = {
    "transformers": in_transformers,
    "timm": in_timm,
    "accelerate": in_accelerate,
    "lightning": in_lightning,
}


def build(kind, seed=0):
    model = network()
    stages = stages_of(model)
    if kind == "gkt":
        return unloaf.GroupKnowledgeTraining(model, stages, groups=2, loops=1, seed=seed)
    if kind == "stochastic depth":
        return unloaf.StochasticDepth(model, stages, final_survival=0.3, seed=seed)
    return unloaf.StimulativeTraining(model, stages, sampler=unloaf.OrderedSampler(), num_subnets=2, seed=seed)
