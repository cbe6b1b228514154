"""What a reader of the simulated figures must know: how they came about, and why they differ where they do. Words only."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

HOW: tuple[str, ...] = (
    "Every curve comes out of the scheduler and the cache that serve, unchanged, in virtual time, against a worker that costs instead of computing: a "
    "roofline of products, weights, attention and KV; copies over links with a rate each way; swap-ins layer by layer, swap-outs in the background. "
    "Conversations have the means of the paper's datasets; the shapes around the means are not published, and chosen.",
    "Three numbers were fitted, on vLLM's curve of Figure 10a alone, and hold for every other figure, model and system: 9 ms of a step and 0.2 ms of "
    "each request in it that are not the device's, and how long a run lasts (15 minutes; it begins with nobody, so its length decides how long histories "
    "get). The A100's efficiencies are from Figures 3 and 4. Nothing else was adjusted.",
    "The baseline is the paper's: it keeps nothing between turns, and prompts and decodes have steps of their own. Latency is read as the 90th percentile "
    "of normalized latency. A point is the mean of two seeds, which all systems share; requests sent in the first quarter of a run do not count. With other think "
    "times than a minute runs are longer or shorter, by the root of the factor. Throughputs are compared at the latency at which the paper compares them.",
)

REMARKS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "3": (
            "Short histories: the paper's new prompt is 'short', taken here to be 32 tokens, which is a quarter of a history of 128 and shows in the prefill. A "
            "decode step over short contexts is the weights alone, 16 ms of reading; the paper measured 24.5, of which some 5 are its program's and not "
            "the device's. Long histories, where products and KV decide, agree.",
        ),
        "4": ("The shortest contexts lie within the error of reading the plot (0.03 on an axis that ends at 1.52).",),
        "12": (
            "The figure's shape is not published. With 32 heads of 128 the paper's kernel reads 1.95 TB/s, 95 % of the A100's peak, where the model lets everything "
            "reach 80 %; that is the fifth by which whatever reads K and V is slower here. Copying out is slower in the paper where there is little to copy: a "
            "gather of many small pieces has costs beside its bytes, which are not modelled.",
        ),
        "10a": ("vLLM's curve is the one that was fitted; the other three follow.",),
        "10b": (
            "Pensieve saturates some 15 % later than in the paper, the baseline 5 %. At these rates 200 requests run at once, and what a request costs a step "
            "beside the device (0.2 ms, fitted where 30 run) decides: a value a third higher would take the difference away, and move Figure 10a.",
        ),
        "10c": (
            "All systems reach less than in the paper, the baseline by 28 %, Pensieve by 20 %: UltraChat's turns are 1 and a Poisson number here, and nearly all "
            "of a conversation falls into a run, so that histories are as long as they get, while the fitted length of a run was found with ShareGPT's long "
            "tail. Shorter histories help the baseline more, which computes them.",
        ),
        "10d": ("As in 10c: the baseline reaches 15 % less than in the paper, with histories as long as they get, and Pensieve 4 %.",),
        "11a": (
            "The ratio is a quarter below the paper's. Its baseline on four GPUs is far slower than arithmetic says: at 0.5 requests a second, with two or three "
            "requests at once, vLLM takes 70 ms a token, of which reading a quarter of the weights is 20; Pensieve takes 45. What was fitted on one GPU (9 ms a "
            "step) does not hold for four processes of 2023, and less so for vLLM's. An experiment: with 36 ms a step for the baseline and 18 for Pensieve, "
            "as these low-load latencies ask for, the ratio rises from 1.54 to 1.66. The rest is vLLM's steep end, from 195 ms at 1.6 to 430 ms at 1.95 "
            "requests a second, which nothing here explains.",
        ),
        "11b": (
            "As in 11a: at low load the paper's vLLM takes 75 ms a token on four GPUs where arithmetic and 9 ms a step make 40, and its Pensieve 50 against 37. An "
            "experiment: with 45 ms a step the baseline's throughput at 275 ms a token falls from 4.2 to 3.0 requests a second, where the paper has 2.0. So overheads of "
            "servers on several GPUs account for half of the difference, and the other half is not modelled.",
        ),
        "13": ("Separate steps lose the same share as in the paper.",),
        "14": (
            "The retention value recomputes fewer tokens, by up to an eighth, as in the paper, but throughput is the same within noise where the paper's is 6 % more. Cost(l) is nearly flat at "
            "these lengths, by arithmetic and by the paper's own Fig. 4: 9 % more after 1,024 tokens than at the beginning, so V = Cost / T orders chunks nearly as T alone does. An experiment: "
            "in an hour instead of 15 minutes, at 4 requests a second asked for, when 45 % of the histories is recomputed, both policies recompute the same share (44.9 %).",
        ),
        "15": (
            "The order is the paper's: who thinks longer finds less, and leaves less throughput. The decline is slower here: with 600 s of thinking a run of 47 minutes has seen few "
            "turns of each conversation, so histories are shorter than in a longer one.",
        ),
    }
)
