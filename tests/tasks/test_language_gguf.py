"""A network whose weights come from a GGUF file."""

import pytest
import torch
import transformers

import tiny
from unloaf.config import Config
from unloaf.data.text.files import ByteTokenizer
from unloaf.engine.run import train
from unloaf.models.language import build_language_model
from unloaf.release.exports import export_run

gguf = pytest.importorskip("gguf")

HEADS, LAYERS, WIDTH = 4, 3, 32
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def network():
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": LAYERS, "vocab_size": 257}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": HEADS}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads, max_position_embeddings=64)).eval()


def interleaved(weight):
    """Rows of queries and keys as llama.cpp has them: both halves of a head in turn."""
    return weight.view(HEADS, 2, WIDTH // HEADS // 2, WIDTH).transpose(1, 2).reshape(WIDTH, WIDTH)


def write(place, model):
    writer = gguf.GGUFWriter(place, "llama")
    for name, value in (
        ("block_count", LAYERS),
        ("context_length", 64),
        ("embedding_length", WIDTH),
        ("feed_forward_length", 32),
        ("head_count", HEADS),
        ("head_count_kv", HEADS),
        ("vocab_size", 257),
        ("rope_dimension_count", WIDTH // HEADS),
    ):
        getattr(writer, f"add_{name}")(value)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_token_list([f"t{index}" for index in range(257)])
    state = {name.removeprefix("model."): value for name, value in model.state_dict().items()}
    tensors = {"token_embd": state["embed_tokens.weight"], "output_norm": state["norm.weight"]}
    tensors["output"] = state["lm_head.weight"]
    for layer in range(LAYERS):
        for name, short in NAMES.items():
            value = state[f"layers.{layer}.{name}.weight"]
            tensors[f"blk.{layer}.{short}"] = interleaved(value) if short in ("attn_q", "attn_k") else value
    for name, value in tensors.items():
        writer.add_tensor(f"{name}.weight", value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    place = tmp_path_factory.mktemp("gguf") / "small.gguf"
    write(place, network())
    return place


def test_its_logits_are_those_of_the_network_that_was_written(file):
    found = build_language_model(f"hf/{file}", ByteTokenizer(), seq_len=16, arguments={}, pretrained=True).eval()
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        # transformers keeps the norm's epsilon in float32
        torch.testing.assert_close(found(tokens).logits, network()(tokens).logits, rtol=1e-5, atol=1e-6)


def test_a_run_from_it_is_trained_and_leaves_as_a_folder(file, tmp_path):
    (tmp_path / "text.txt").write_text("A subnet that works is speed at inference. " * 8)
    settings = Config(
        task="language",
        dataset="text",
        data_dir=str(tmp_path / "text.txt"),
        model=f"hf/{file}",
        pretrained=True,
        tokenizer="byte",
        seq_len=16,
        batch_size=8,
        epochs=1,
        method="st",
        opt="adamw",
        lr=1e-3,
        device="cpu",
        output=str(tmp_path),
        name="run",
    )
    result = train(settings, console=tiny.quiet())
    exported = export_run(result.path, depths="2", output=tmp_path / "small", device="cpu")
    again = transformers.AutoModelForCausalLM.from_pretrained(exported.folder)
    assert (again.config.num_hidden_layers, exported.difference) == (2, 0.0)
    assert not hasattr(again.config, "quantization_config")
