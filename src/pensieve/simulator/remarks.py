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
        "4": (
            "The shortest contexts lie within the error of reading the plot (0.03 on an axis that ends at 1.52).",
        ),
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
        "10d": (
            "As in 10c: the baseline reaches 15 % less than in the paper, with histories as long as they get, and Pensieve 4 %.",
        ),
        "11a": (
            "The ratio is a quarter below the paper's, because overheads fitted on one GPU do not hold for servers of four processes: at 0.5 requests a second, with two or "
            "three requests at once, the paper's vLLM takes 70 ms a token, of which reading a quarter of the weights is 20; Pensieve takes 45. An experiment "
            "(benchmarks/four_gpus.py): with a step's and a request's overhead fitted on these two curves instead of Figure 10a's, 22 ms a step and 1.0 ms a request in it for "
            "vLLM, 14 and 0.5 ms for Pensieve, vLLM's curve comes out within 2 %, its steep end included, Pensieve's within 5 %, and the ratio is 2.08 where the paper has 2.04.",
        ),
        "11b": (
            "As in 11a. The overheads of the experiment, fitted on 11a alone and held for this other model, predict 6.1 requests a second at 400 ms a token for Pensieve and 2.3 "
            "for the baseline, a ratio of 2.60 where the paper has 3.0, and where the fitted overheads of one GPU make 2.16. So what is missing in the figure is what a server of "
            "several processes does for each request in each step, and not how a cache is modelled.",
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
