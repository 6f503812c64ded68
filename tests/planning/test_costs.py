"""The arithmetic of a plan, against values computed by hand and against models that are really built."""

import pytest

from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.planning.costs import (
    GPUS,
    Hardware,
    Layers,
    Lengths,
    Load,
    ModelCosts,
    Search,
    costs_of_config,
    report,
)

MODEL = ModelCosts(1_600, Layers(1_000, 2, 8), Layers(500, 3, 4), 16)


def test_flop_of_a_sequence_and_of_many_inputs() -> None:
    assert Layers(1_000, 2, 8).flop(10) == 2 * 1_000 * 10 + 4 * 2 * 8 * 100 == 26_400
    load = Load("queries", 30, (Lengths(10), Lengths(20, (6,)), Lengths(30, (6, 6))))
    assert load.num_tokens == 30 * 20
    assert load.num_images == 30 * 1
    # 10 tokens: 26,400. 20: 65,600. 30: 117,600. A picture of 6 patches: 2 * 500 * 6 + 4 * 3 * 4 * 36 = 7,728.
    assert load.flop(MODEL) == pytest.approx(30 * (26_400 + 65_600 + 117_600 + 3 * 7_728) / 3)
    assert Load("queries", 0, ()).flop(MODEL) == 0


def test_ten_million_queries_among_ten_million_candidates_of_1536() -> None:
    """2 x 10^7 x 10^7 x 1536 = 3.072 x 10^17; an H100 at 40 % of 67 TFLOP/s takes 11,463 s; eight take an eighth."""
    search = Search("all", 10**7, 10**7, 42)
    assert search.flop(1536) == 3.072e17
    assert search.bytes_read(1536) == 19_532 * 10**7 * 1536 * 4  # a block of 512 queries reads every candidate once
    one, eight = Hardware("H100", 1, 0.4), Hardware("H100", 8, 0.4)
    assert one.search_hours(search, 1536) == pytest.approx(11_462.69 / 3600, rel=1e-5)
    assert eight.search_hours(search, 1536) == pytest.approx(one.search_hours(search, 1536) / 8)
    # So few queries that reading the candidates takes longer: 6,144 bytes x 10^7 at 300 GB/s are 0.2048 s.
    assert Hardware("L4", 1, 1.0).search_hours(Search("few", 1, 10**7, 1), 1536) == pytest.approx(0.2048 / 3600)


def test_hours_are_flop_over_peak_and_utilization() -> None:
    assert Hardware("A100", 2, 0.5).hours(312e12 * 3600, "bfloat16") == pytest.approx(1)
    assert Hardware("A100", 2, 0.5).hours(19.5e12 * 3600, "float32") == pytest.approx(1)
    assert all(gpu.half > gpu.single for gpu in GPUS.values())
    with pytest.raises(Gen2EmbedError, match="gpu is 'H9000'; known: T4, V100"):
        Hardware("H9000", 1, 0.4)


def test_the_weights_of_the_published_qwen2_vl_2b() -> None:
    """The numbers of docs/guides/memory_and_time.md, from the published configuration; no memory is allocated."""
    from transformers import Qwen2VLConfig

    text = {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12}
    text |= {"num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True}
    costs = costs_of_config(Qwen2VLConfig(text_config=text, vision_config={"hidden_size": 1536}))
    attention = 2 * 1536**2 + 1536 + 2 * (1536 + 1) * 256
    language = 28 * (attention + 3 * 1536 * 8960 + 2 * 1536) + 1536
    assert costs.parameters == 2_208_985_600
    assert costs.language == Layers(language, 28, 1536)
    assert costs.vision == Layers(2_208_985_600 - language - 151936 * 1536, 32, 1280)
    assert costs.dimensions == 1536


def test_the_report_says_what_it_assumes() -> None:
    loads = [Load("queries", 10**6, (Lengths(100, (1024,)),), 50_000)]
    model = ModelCosts(2_208_985_600, Layers(1_310_000_000, 28, 1536), Layers(665_000_000, 32, 1280), 1536)
    text = report("some model", model, loads, [Search("all", 10**6, 10**6, 42)], Hardware("H100", 8, 0.4))
    for said in (
        "2.209 B parameters (language 1.31 B + vision 665 M, the rest token embeddings), 4.42 GB in bfloat16",
        "8 x H100, 989 TFLOP/s in bfloat16 and 67 in float32 (published dense peaks), 80 GB; assumed to reach 40 %",
        "lengths   of 1 of 1,000,000 queries; the others are assumed to have the same mean",
    ):
        assert said in text
    encode = next(line for line in text.splitlines() if line.startswith("encode queries")).split("  ")
    # 2 x 1.31e9 x 100 + 4 x 28 x 1536 x 10^4, 2 x 665e6 x 1024 + 4 x 32 x 1280 x 1024^2: 1.8e12 FLOP an input.
    assert [cell.strip() for cell in encode if cell.strip()][1:] == [
        *("1,000,000", "100 M", "1 M", "1.8e+18", "100 GB", "6.14 GB", "0.158")
    ]
    assert "warning" not in text
    assert "do not fit into the 16 GB of a T4" in report(
        "big", ModelCosts(10**10, Layers(10**10, 1, 1), None, 8), [], [], Hardware("T4", 1, 0.4)
    )
