"""Training what was attached: priors alone move, they travel in a small file, and training goes on from it exactly."""

import copy

import pytest
import torch
from families import BY_NAME, GROUPED, Family

pytest.importorskip("transformers")
pytest.importorskip("safetensors")

from eotattn import RecencyPrior, goat_prior
from eotattn.integrations import attach, load_prior, save_prior

#: Wide enough for its priors to be a small part of it, as in a real model.
WIDE = Family("wide", "LlamaForCausalLM", "LlamaConfig", {**GROUPED, "hidden_size": 128, "vocab_size": 1024}, gain=1.0)


def prior(num_heads):
    return goat_prior(num_heads, num_frequencies=2, length_scale=8.0, init="neutral")


def batches(count):
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 61, (2, 12), generator=generator) for _ in range(count)]


def optimizer_of(attached):
    return torch.optim.AdamW(attached.parameters(), lr=0.1, weight_decay=0.0)


def train(model, optimizer, ids):
    losses = []
    for batch in ids:
        optimizer.zero_grad()
        loss = model(batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_only_priors_train():
    model = WIDE.build("sdpa").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attached = attach(model, prior, freeze_content=True)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in attached.parameters()}
    losses = train(model, optimizer_of(attached), batches(1) * 8)
    assert losses[-1] < losses[0]
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, start[name])}
    assert moved == set(start) - set(before)
    assert sum(p.numel() for p in attached.parameters()) < 1e-3 * sum(p.numel() for p in model.parameters())
    attached.detach()
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_save_load_and_continue_is_exact(tmp_path):
    model = BY_NAME["llama"].build("sdpa")
    untouched = copy.deepcopy(model)
    attached = attach(model, prior, layers=[1], heads=[3, 0], freeze_content=True)
    optimizer = optimizer_of(attached)
    train(model, optimizer, batches(2))
    path = save_prior(model, tmp_path / "kept" / "prior.safetensors")
    assert [file.name for file in path.parent.iterdir()] == ["prior.safetensors"]
    state = copy.deepcopy(optimizer.state_dict())
    expected = train(model, optimizer, batches(4)[2:])
    again = attach(untouched, prior, layers=[1], heads=[3, 0], freeze_content=True)
    load_prior(untouched, path)
    other = optimizer_of(again)
    other.load_state_dict(state)
    assert train(untouched, other, batches(4)[2:]) == expected
    for one, two in zip(attached.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"prior": prior}, "layers"),
        ({"prior": prior, "layers": [1], "heads": [0, 1]}, "heads"),
        ({"prior": RecencyPrior, "layers": [1]}, "prior of model.layers.1.self_attn"),
        (
            {"prior": lambda heads: goat_prior(heads, num_frequencies=2, length_scale=9.0), "layers": [1]},
            "prior of model.layers.1.self_attn",
        ),
    ],
)
def test_what_the_card_does_not_say_is_refused(tmp_path, options, argument):
    model = BY_NAME["llama"].build("sdpa")
    with attach(model, prior, layers=[1]) as attached:
        for parameter in attached.parameters():
            torch.nn.init.ones_(parameter)
        path = save_prior(model, tmp_path / "prior.safetensors")
    with attach(model, **options) as attached:
        before = [parameter.clone() for parameter in attached.parameters()]
        with pytest.raises(ValueError, match="load_prior: ") as error:
            load_prior(model, path)
        assert str(error.value).startswith(f"load_prior: {argument} must be ")
        assert all(torch.equal(p, old) for p, old in zip(attached.parameters(), before, strict=True))


def test_other_weights_and_other_classes_are_refused_and_casts_are_not(tmp_path):
    model = WIDE.build("sdpa")
    with attach(model, prior):
        path = save_prior(model, tmp_path / "prior.safetensors")
    for family, seed, message in ((WIDE, 1, "model must have the embedding"), (BY_NAME["qwen2"], 0, "class must be ")):
        other = family.build("sdpa", seed=seed)
        with attach(other, prior), pytest.raises(ValueError, match=f"load_prior: {message}"):
            load_prior(other, path)
    cast = WIDE.build("sdpa").bfloat16()
    with attach(cast, prior):
        load_prior(cast, path)


def test_files_that_hold_no_priors_are_refused(tmp_path):
    from safetensors.torch import save_file

    model = BY_NAME["llama"].build("sdpa")
    with pytest.raises(ValueError, match="save_prior: model must have priors attached"):
        save_prior(model, tmp_path / "prior.safetensors")
    save_file({"x": torch.ones(1)}, tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors")
    with attach(model, prior):
        for name, rule in (("absent", "be an existing file"), ("other", "hold priors"), ("text", "hold priors")):
            with pytest.raises(ValueError, match=f"load_prior: path must {rule}"):
                load_prior(model, tmp_path / f"{name}.safetensors")


def test_the_trainer_of_transformers_trains_saves_and_resumes(tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    data = [{"input_ids": row, "labels": row} for batch in batches(8) for row in batch]

    def trained(folder, steps, resume=None):
        model = BY_NAME["llama"].build("sdpa")
        attached = attach(model, prior, freeze_content=True)
        arguments = TrainingArguments(
            str(folder),
            max_steps=steps,
            per_device_train_batch_size=2,
            save_steps=2,
            learning_rate=0.05,
            lr_scheduler_type="constant",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            seed=0,
            dataloader_pin_memory=False,
        )
        Trainer(model, arguments, train_dataset=data).train(resume_from_checkpoint=resume)
        return attached.parameters(), model

    whole, model = trained(tmp_path / "a", 4)
    untouched = BY_NAME["llama"].build("sdpa").state_dict()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in untouched.items())
    assert max(float(parameter.detach().abs().max()) for parameter in whole) > 0.05
    trained(tmp_path / "b", 2)
    resumed, _ = trained(tmp_path / "b", 4, resume=str(tmp_path / "b" / "checkpoint-2"))
    assert all(torch.equal(one, two) for one, two in zip(whole, resumed, strict=True))


def test_priors_train_beside_adapters(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(BY_NAME["llama"].build("sdpa"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    frozen = {name: value.clone() for name, value in model.named_parameters() if not value.requires_grad}
    attached = attach(model, prior)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    start = [parameter.detach().clone() for parameter in trainable]
    train(model, torch.optim.AdamW(trainable, lr=0.1), batches(3))
    assert any("lora" in name for name, parameter in model.named_parameters() if parameter.requires_grad)
    assert sum(not torch.equal(p, old) for p, old in zip(trainable, start, strict=True)) == len(trainable)
    assert all(torch.equal(dict(model.named_parameters())[name], value) for name, value in frozen.items())
    path = save_prior(model, tmp_path / "prior.safetensors")
    plain = BY_NAME["llama"].build("sdpa")
    with attach(plain, prior) as other:
        load_prior(plain, path)
        assert all(torch.equal(p, q) for p, q in zip(other.parameters(), attached.parameters(), strict=True))
