"""Tables of results for readers: rows in words, at most ten, without names of rows and without aims.

READ says which rows of a bench a reader is told, in which words and with how many digits.  The full
tables are in docs/."""

# Bench -> (what, value as a format of the row's number, row).
READ: dict[str, list[tuple[str, str, str]]] = {
    "demo": [
        ("the student, untrained", "{:.1f} %", "untrained_student"),
        ("the student, trained alone", "{:.1f} %", "alone"),
        ("**the student, trained with DisCo**", "**{:.1f} %**", "disco"),
        ("the teacher", "{:.1f} %", "teacher"),
    ],
    "accuracy": [
        ("the student, untrained: kNN", "{:.1f} %", "untrained_student_knn"),
        ("the student, trained alone: kNN", "{:.1f} %", "alone_knn"),
        ("the student, trained alone for DisCo's time: kNN", "{:.1f} %", "alone_equal_time_knn"),
        ("**the student, trained with DisCo: kNN**", "**{:.1f} %**", "disco_knn"),
        ("the teacher: kNN", "{:.1f} %", "teacher_knn"),
        ("the student, untrained: linear", "{:.1f} %", "untrained_student_linear"),
        ("the student, trained alone: linear", "{:.1f} %", "alone_linear"),
        (
            "the student, trained alone for DisCo's time: linear",
            "{:.1f} %",
            "alone_equal_time_linear",
        ),
        ("**the student, trained with DisCo: linear**", "**{:.1f} %**", "disco_linear"),
        ("the teacher: linear", "{:.1f} %", "teacher_linear"),
    ],
    "throughput": [
        (
            "a training step beside the official recipe's",
            "{:.2f} times as fast",
            "step_vs_official_cpu",
        ),
        ("the same in bf16", "{:.2f} times as fast", "step_vs_official_bf16_cpu"),
        (
            "a step whose teacher is replayed, beside one whose teacher runs",
            "{:.2f} times as fast",
            "cached_vs_live_step_cpu",
        ),
        ("share of a step that waits for data", "{:.1%}", "data_wait_cpu"),
        ("the same recipe on a GPU", "{:.2f} times as fast", "step_vs_official_gpu"),
        ("images/s on a GPU", "{:.0f}", "step_ips_gpu"),
    ],
    "kernels": [
        ("MoCo's loss beside plain torch", "{:.1f} times as fast", "moco_cpu_speedup_b256"),
        ("its memory", "{:.0f} times less", "moco_cpu_memory_ratio_b256"),
        ("SEED's loss beside plain torch", "{:.1f} times as fast", "seed_cpu_speedup_b256"),
        ("its memory", "{:.0f} times less", "seed_cpu_memory_ratio_b256"),
        (
            "MoCo's loss as a CUDA graph, beside compiled torch in bf16 as one",
            "{:.1f} times as fast",
            "moco_vs_compile_bf16_b1024",
        ),
        (
            "the same beside PyTorch's flash attention",
            "{:.1f} times as fast",
            "moco_vs_sdpa_b1024",
        ),
        ("its time, of the least that the GPU allows", "{:.1f} times", "moco_over_floor_b1024"),
    ],
    "loader": [
        (
            "the loader beside torchvision's faster one",
            "{:.1f} times as fast",
            "loader_vs_torchvision_cpu",
        ),
        ("images/s on the CPU, two views each", "{:.0f}", "loader_ips_cpu"),
        ("images/s on a GPU, two views each", "{:.0f}", "loader_ips_gpu"),
    ],
    "export": [
        (
            "MobileNetV3-Large in onnxruntime beside torch",
            "{:.1f} times as fast",
            "onnx_speedup_mobv3",
        ),
        (
            "its int8 file beside its float one, both in onnxruntime",
            "{:.2f} times as fast",
            "int8_speedup_mobv3",
        ),
        ("its int8 file", "{:.1f} times smaller", "int8_size_ratio_mobv3"),
        ("what int8 costs it", "{:.1f} points of kNN", "int8_drop_knn_mobv3"),
        ("what int8 costs ResNet-18", "{:.1f} points of kNN", "int8_drop_knn_r18"),
        ("what int8 costs EfficientNet-B0", "{:.1f} points of kNN", "int8_drop_knn_effb0"),
    ],
}


def told(result: dict) -> list[tuple[str, str]]:
    """(what, value) of each row of a result that READ names; a row without a value says so."""
    rows = {row["name"]: row["value"] for row in result["summary"]}
    return [
        (what, form.format(rows[name]) if rows.get(name) is not None else "not measured yet")
        for what, form, name in READ[result["bench"]]
        if name in rows
    ]
