#!/usr/bin/python
"""Judge before loading whether a model fits a host's memory."""

DOCUMENTATION = r"""
module: memory_fit
short_description: Say before loading whether a model fits this host's memory, and what would
description:
  - Adds up what a model takes on a host where the GPU uses the host's own memory (DGX Spark), term by term, and
    compares it with MemTotal and the watchdog's floor. A Spark that runs out of memory freezes until its plug is
    pulled, so this is known first.
  - Weights are summed from the headers of the safetensors files where they are on the host; no tensor is read. Where
    they are not, they are predicted from O(routed_experts).
  - Two questions can be put. C(profile) asks whether the profile fits this host, and is judged on MemTotal less what
    the host itself uses, so a host that already serves the model gets the answer it got before. C(start) asks whether a
    load can begin now, and is judged on MemAvailable; it is what the service itself asks at each start.
  - The reasoning and the source of every figure are in docs/memory.md.
version_added: 0.1.0
author: The recipe's authors
attributes:
  check_mode:
    support: full
    description: It never changes anything.
  diff_mode:
    support: none
    description: There is nothing to show.
  platform:
    support: full
    platforms: Linux
    description: It reads /proc/meminfo.
options:
  model_dir:
    description:
      - Folder of the checkpoint on the host. Its headers are summed and compared with its config.json.
      - Where it is missing or holds no weights yet, O(routed_experts), O(expected_routed_experts) or O(weights_bytes)
        is used instead.
    type: path
  routed_experts:
    description: Routed experts in each layer (K) of a DeepSeek V4 Flash checkpoint, to predict its size.
    type: int
  weights_bytes:
    description: Size of the weights where neither headers nor K are known, by vLLM's rule (V(94g), or bytes).
    type: str
  mtp:
    description: Whether the checkpoint's multi-token-prediction layer is loaded as drafter of a speculative
      configuration.
    type: bool
    default: false
  kv_cache_memory:
    description: What vLLM gets as C(--kv-cache-memory-bytes), by vLLM's rule. V(14G) is 14 x 2^30 bytes, V(14g) 14 x
      10^9.
    type: str
    required: true
  max_model_len:
    description: Context in tokens, prompt and answer together.
    type: int
    required: true
  max_num_batched_tokens:
    description: Tokens of one step. Sets what a long prompt leaves held and how much KV cache one sequence needs.
    type: int
    required: true
  max_num_seqs:
    description: Sequences served at once.
    type: int
    default: 1
  watchdog_min_available_kb:
    description: The watchdog's floor, kB of MemAvailable. What is left is counted above it.
    type: int
    required: true
  mem_total_kb:
    description:
      - MemTotal in kB to judge on, instead of this host's. Then nothing is read from this host's memory, and without
        O(mem_available_kb) its own use is an estimate.
    type: int
  mem_available_kb:
    description: MemAvailable in kB to judge on, instead of what this host says now.
    type: int
  engine:
    description: V(gb10) for CUDA in the host's own memory, V(cpu) for the CPU build of vLLM.
    type: str
    choices: [gb10, cpu]
    default: gb10
  expected_routed_experts:
    description: What the checkpoint's config.json must say; another number fails.
    type: int
  expandable_segments:
    description: Whether PyTorch's CUDA allocator runs with C(expandable_segments:True), as in the profiles'
      environment.
    type: bool
    default: true
  gpu_memory_utilization:
    description: Share of the memory that vLLM wants to see free when it starts. Given, the advice says when vLLM itself
      would refuse.
    type: float
  profile:
    description: Name of the profile, for messages.
    type: str
  profiles:
    description: The profiles as data (C(reap_profiles)). Given, the advice says which of the others fit this host.
    type: dict
  question:
    description: What is asked, see above.
    type: str
    choices: [profile, start]
    default: profile
  host_memory_file:
    description: Where the service's start gate left what this host uses without a model.
    type: path
    default: /var/lib/reap/host-memory.json
  enforce:
    description: Whether the verdict V(refuse) fails the task.
    type: bool
    default: true
"""

EXAMPLES = r"""
- name: The profile fits this host
  memory_fit:
    profile: "{{ reap_profile }}"
    model_dir: "{{ reap_model_dir }}"
    routed_experts: "{{ reap_profile_data.model_expect.n_routed_experts }}"
    mtp: "{{ reap_profile_data.speculative is not none }}"
    kv_cache_memory: "{{ reap_profile_data.kv_cache_memory }}"
    max_model_len: "{{ reap_profile_data.max_model_len }}"
    max_num_batched_tokens: "{{ reap_profile_data.max_num_batched_tokens }}"
    max_num_seqs: "{{ reap_profile_data.max_num_seqs }}"
    watchdog_min_available_kb: "{{ reap_profile_data.watchdog_min_available_kb }}"
    profiles: "{{ reap_profiles }}"
  register: __preflight_fit

- name: A host with 119.7 GiB is judged from elsewhere
  memory_fit:
    routed_experts: 160
    mtp: true
    kv_cache_memory: 6G
    max_model_len: 200000
    max_num_batched_tokens: 4096
    watchdog_min_available_kb: 6291456
    mem_total_kb: 125514547
    enforce: false
  delegate_to: localhost
"""

RETURN = r"""
verdict:
  description:
    - C(fits) when the high estimate stays above the floor by RV(margin_bytes), C(tight) when the expected one does not
      fall below the floor, else C(refuse). A KV cache too small for one sequence of the whole context is refused as
      well.
  returned: always, but for bad arguments
  type: str
  sample: tight
fits:
  description: Whether it may be loaded, that is C(fits) or C(tight).
  returned: always, but for bad arguments
  type: bool
  sample: true
message:
  description: The verdict in one line; a refusal names the shortfall in GiB.
  returned: always, but for bad arguments
  type: str
  sample: "tight: profile k144-nospec-200k leaves 0.57 GiB above the floor of 8.00 GiB as expected, at worst 5.97 GiB
  below it"
ledger:
  description: Every term once, in bytes.
  returned: always, but for bad arguments
  type: list
  elements: dict
  contains:
    name:
      description: weights_experts, weights_other, runtime_tables, kv_cache, cuda_graphs, engine or host.
      type: str
      returned: always
    bytes:
      description: The expected figure.
      type: int
      returned: always
    low_bytes:
      description: The least it may be.
      type: int
      returned: always
    high_bytes:
      description: The most it may be.
      type: int
      returned: always
    basis:
      description: measured, derived or estimated.
      type: str
      returned: always
    source:
      description: Where the figure comes from.
      type: str
      returned: always
  sample:
    - {name: kv_cache, bytes: 15032385536, low_bytes: 15032385536, high_bytes: 15032385536, basis: derived, source: as
      given}
headroom_bytes:
  description: What stays above the floor as expected; negative is the shortfall.
  returned: always, but for bad arguments
  type: int
  sample: 612000000
headroom_worst_bytes:
  description: The same with every term high.
  returned: always, but for bad arguments
  type: int
  sample: -6410000000
headroom_best_bytes:
  description: The same with every term low.
  returned: always, but for bad arguments
  type: int
  sample: 3380000000
margin_bytes:
  description: What RV(headroom_worst_bytes) must reach for C(fits).
  returned: always, but for bad arguments
  type: int
  sample: 1073741824
mem_total_bytes:
  description: MemTotal that was judged on.
  returned: always, but for bad arguments
  type: int
  sample: 128526895513
mem_available_bytes:
  description: MemAvailable that was read or given.
  returned: always, but for bad arguments; null where not known
  type: int
  sample: 123000000000
floor_bytes:
  description: The floor.
  returned: always, but for bad arguments
  type: int
  sample: 8589934592
kv_tokens:
  description: Tokens that the KV cache holds as vLLM logs them ("GPU KV cache size").
  returned: always, but for bad arguments; null where no accounting is known
  type: int
  sample: 762036
kv_concurrency:
  description: Sequences of the whole context as vLLM logs them ("Maximum concurrency").
  returned: always, but for bad arguments; null where no accounting is known
  type: float
  sample: 3.81
kv_page_true_tokens:
  description: Tokens by the whole pages that admission takes.
  returned: always, but for bad arguments; null where no accounting is known
  type: int
  sample: 691054
kv_page_true_concurrency:
  description: The same as sequences.
  returned: always, but for bad arguments; null where no accounting is known
  type: float
  sample: 3.46
kv_min_bytes:
  description: The least KV cache with which one sequence of the whole context is admitted.
  returned: always, but for bad arguments; null where no accounting is known
  type: int
  sample: 4351197312
kv_accounting:
  description: Name of the accounting, with the vLLM releases it holds for.
  returned: always, but for bad arguments; null where no accounting is known
  type: str
  sample: DeepSeek V4 FP8 MLA, vLLM 0.20 to 0.23, block size 256
kv_reason:
  description: Why the KV figures are null.
  returned: always, but for bad arguments; null where they are not
  type: str
  sample: no KV accounting is known for a llama model with these layers
weights_from:
  description: C(headers), C(prediction) or C(given).
  returned: always, but for bad arguments
  type: str
  sample: headers
advice:
  description: What would fit, in sentences.
  returned: always, but for bad arguments
  type: list
  elements: str
  sample: ["kv_cache_memory reserves 14.00 GiB for one sequence needing 4.05 GiB: 5G would free 9.00 GiB and give the
  verdict fits."]
advice_data:
  description: The figures of the advice, for programs; for example C(kv_suggested), C(kv_max_fit_bytes),
    C(floor_max_kb), C(profiles).
  returned: always, but for bad arguments
  type: dict
  sample: {kv_suggested: 5G, floor_max_kb: 8989716}
question:
  description: The question that was judged.
  returned: always, but for bad arguments
  type: str
  sample: profile
profile:
  description: The profile's name as given.
  returned: always, but for bad arguments
  type: str
  sample: k144-nospec-200k
"""

import platform
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.reap.errors import ReapError
from ansible.module_utils.reap.memory import FitRequest, HostMemory, advised_fit


class MemoryFit:
    """The module's arguments, judged."""

    def __init__(self, module: AnsibleModule) -> None:
        self.module = module
        self.params = dict(module.params)

    def host(self) -> HostMemory:
        """The memory to judge on: what was given, and this host's for the rest."""
        total, available = (self._kb(key) for key in ("mem_total_kb", "mem_available_kb"))
        return HostMemory.read(remembered_file=Path(self.params["host_memory_file"]), total=total, available=available)

    def request(self) -> FitRequest:
        """What shall be served."""
        elsewhere = ("mem_total_kb", "mem_available_kb", "profiles", "question")
        return FitRequest.from_mapping({key: value for key, value in self.params.items() if key not in elsewhere})

    def run(self) -> None:
        """Judge and leave."""
        try:
            fit = advised_fit(self.request(), self.host(), self.params["question"], self.params["profiles"])
        except ReapError as error:
            self.module.fail_json(msg=f"{platform.node()}: {error}")
            return
        result = fit.to_dict()
        if not fit.fits and self.params["enforce"]:
            self.module.fail_json(
                msg=f"{platform.node()}: {fit.message}. {' '.join(fit.advice)}", changed=False, **result
            )
            return
        if fit.verdict != "fits":
            self.module.warn(f"memory: {fit.message}")
        self.module.exit_json(changed=False, **result)

    def _kb(self, key: str) -> int | None:
        value = self.params[key]
        if value is None:
            return None
        if value < 0 or (key == "mem_total_kb" and value == 0):
            raise ReapError(f"{key} is {value}; kB of memory are wanted")
        return int(value) * 1024


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec={
            "model_dir": {"type": "path"},
            "routed_experts": {"type": "int"},
            "weights_bytes": {"type": "str"},
            "mtp": {"type": "bool", "default": False},
            "kv_cache_memory": {"type": "str", "required": True},
            "max_model_len": {"type": "int", "required": True},
            "max_num_batched_tokens": {"type": "int", "required": True},
            "max_num_seqs": {"type": "int", "default": 1},
            "watchdog_min_available_kb": {"type": "int", "required": True},
            "mem_total_kb": {"type": "int"},
            "mem_available_kb": {"type": "int"},
            "engine": {"type": "str", "choices": ["gb10", "cpu"], "default": "gb10"},
            "expected_routed_experts": {"type": "int"},
            "expandable_segments": {"type": "bool", "default": True},
            "gpu_memory_utilization": {"type": "float"},
            "profile": {"type": "str"},
            "profiles": {"type": "dict"},
            "question": {"type": "str", "choices": ["profile", "start"], "default": "profile"},
            "host_memory_file": {"type": "path", "default": "/var/lib/reap/host-memory.json"},
            "enforce": {"type": "bool", "default": True},
        },
        required_one_of=[("model_dir", "routed_experts", "weights_bytes")],
        supports_check_mode=True,
    )
    MemoryFit(module).run()


if __name__ == "__main__":
    main()
