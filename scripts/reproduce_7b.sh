#!/usr/bin/env bash
# The paper's table on one GPU: train -> check -> attack -> judge -> evaluate -> report, for base, base + safety prompt and RR.
#
#   set -a; . settings.sh; set +a               # BEHAVIORS=behaviors.jsonl, JUDGE=harmbench-multimodal, and so on, see below
#   bash scripts/reproduce_7b.sh --dry-run      # print every command, and what each stage costs; also with nothing set yet
#   bash scripts/reproduce_7b.sh                # run them, and end with a table of the stages
#
# Every step is a run directory under $OUT and its command is given each time: a finished one says so and ends, an interrupted
# one goes on where it was, one that was made with other settings is refused and nothing is mixed. Weights and data are yours:
# `mm-cb doctor --recipe $RECIPE` and `mm-cb data check $RECIPE` say what is missing and how to get it.
# What is set to `none` is left out, and the page then says "not measured" or "not judged". Settings, as variables:
#
#   MODEL          llava-hf/llava-v1.6-mistral-7b-hf       hub id or directory
#   RECIPE         llava-next-mistral-7b                   `mm-cb train --list`, or a YAML file
#   TRAIN          (nothing)                               further `mm-cb train` arguments: "training.max_steps=150 ..."
#   ADAPTER        (trained here)                          a finished adapter: training is left out
#   BEHAVIORS      needed                                  `mm-cb data build behaviors` makes the paper's from your copies;
#                                                          with `facts` on every line (docs/formats.md) pgd_facts runs too
#   SAFETY_PROMPT  none                                    text file: the operator's words in front of every request
#   EPSILON STEPS RESTARTS   32/255 1000 1                 the attacks' budget
#   ATTACK         --max-new-tokens 512                    further `mm-cb attack` arguments: "--batch 16 --max-new-tokens 512"
#   PGD            (nothing)                               more for every PGD: "--optimizer sign", the textbook's steps
#   ADAPTIVE       (nothing)                               more for those that know the breaker: "--balance"
#   CONVERGENCE    12                                      behaviours on which each PGD is given twice the
#                                                          steps, to see whether it had finished; 0 = not checked
#   CHECK          (nothing)                               further `mm-cb attack check` arguments, or none: see below
#   JUDGE          needed                                  `mm-cb judge --help` lists them; none = the model's own, if any
#   JUDGING        (nothing)                               further `mm-cb judge` arguments: "--endpoint URL"
#   EVAL           (nothing)                               further `mm-cb eval` arguments: "--batch 16"
#   MMMU           MMMU/MMMU                               hub id, local copy, or none
#   LLAVA_WILD     lmms-lab/llava-bench-in-the-wild        hub id, local copy, or none
#   RULE_FILE      needed with LLAVA_WILD                  the original rule file, LLaVA's llava/eval/table/rule.json
#   WILD_JUDGE     needed with LLAVA_WILD                  the judge: the name it is served under, or a hub id
#   WILD_ENDPOINT  (nothing)                               OpenAI-compatible address of that judge, key in MM_CB_API_KEY
#   OVER_REFUSAL   needed                                  benign look-alikes: MOSSBench, XSTest or our JSONL, or none
#   FUNCTION_CALLING   none                                BFCL's questions (bfcl_eval/data): the agents stage, function calling kept
#   HARMFUL_CALLS  none                                    forbidden requests to an agent and their twins (docs/formats.md), judged
#                                                          by JUDGE; both with RECIPE=qwen2.5-vl-7b-agents or another for agents
#   RATE           400                                     TFLOP a second of your device, for the estimates of --dry-run
#   DEVICE DTYPE SEED OUT MM_CB   cuda bfloat16 0 runs/7b mm-cb
#
# The sanity battery (`mm-cb attack check`, on the breaker with the base as its control) has EPSILON and STEPS of the attacks,
# runs every search many times over, for each of 12 behaviours; CHECK="--count 4" asks for fewer.
# A check that fails ends nothing here: the page then says "no claim". CHECK=none leaves the battery out.
set -euo pipefail

MODEL="${MODEL:-llava-hf/llava-v1.6-mistral-7b-hf}"
RECIPE="${RECIPE:-llava-next-mistral-7b}"
EPSILON="${EPSILON:-32/255}"
STEPS="${STEPS:-1000}"
RESTARTS="${RESTARTS:-1}"
MMMU="${MMMU:-MMMU/MMMU}"
LLAVA_WILD="${LLAVA_WILD:-lmms-lab/llava-bench-in-the-wild}"
SAFETY_PROMPT="${SAFETY_PROMPT:-none}"
FUNCTION_CALLING="${FUNCTION_CALLING:-none}"
HARMFUL_CALLS="${HARMFUL_CALLS:-none}"
CONVERGENCE="${CONVERGENCE:-12}"
RATE="${RATE:-400}"
DEVICE="${DEVICE:-cuda}"
DTYPE="${DTYPE:-bfloat16}"
SEED="${SEED:-0}"
OUT="${OUT:-runs/7b}"
read -ra mm_cb <<<"${MM_CB:-mm-cb}"
read -ra train_more <<<"${TRAIN:-}"
read -ra attack_more <<<"${ATTACK:---max-new-tokens 512}"
read -ra pgd_more <<<"${PGD:-}"
read -ra adaptive_more <<<"${ADAPTIVE:-}"
read -ra judge_more <<<"${JUDGING:-}"
read -ra eval_more <<<"${EVAL:-}"
read -ra check_more <<<"${CHECK:-}"
dry_run=0

fail() {
    echo "reproduce_7b: $1" >&2
    exit 2
}

for argument in "$@"; do
    case "$argument" in
    --dry-run) dry_run=1 ;;
    -h | --help)
        sed -n '2,/^set -euo/s/^# \{0,1\}//p' "$0"
        exit 0
        ;;
    *) fail "unknown argument \`$argument\`; valid: --dry-run, --help. Everything else is a variable, see --help." ;;
    esac
done

wrong=()
problem() { wrong+=("$1"); }

needed() { # name, what it is: without it a dry run shows a placeholder
    if [ -n "${!1:-}" ]; then return 0; fi
    problem "$1 is missing: $2."
    printf -v "$1" '%s' "<$1>"
}

existing() { # name, what it is
    if [[ "${!1}" != none && "${!1}" != "<$1>" && ! -e "${!1}" ]]; then problem "$1 must be $2, but \`${!1}\` is not there."; fi
}

for name in STEPS RESTARTS CONVERGENCE RATE; do
    if [[ ! "${!name}" =~ ^[0-9]+$ ]]; then fail "$name must be a whole number, got \`${!name}\`."; fi
done
if [ "$RATE" = 0 ]; then fail "RATE must be above 0."; fi
needed BEHAVIORS "the behaviours file (JSONL); \`mm-cb data build behaviors\` makes it"
if [[ "$BEHAVIORS" != "<BEHAVIORS>" && ! -f "$BEHAVIORS" ]]; then
    problem "BEHAVIORS must be the behaviours file (JSONL), but \`$BEHAVIORS\` is not there."
fi
needed JUDGE "who judges the attacked answers, or none to leave it out"
needed OVER_REFUSAL "benign look-alikes (MOSSBench, XSTest, or JSONL), or none to leave them out"
existing OVER_REFUSAL "a file or folder of benign look-alikes"
existing SAFETY_PROMPT "a text file"
existing FUNCTION_CALLING "BFCL's folder of questions, or one file of it"
existing HARMFUL_CALLS "a file of forbidden requests to an agent"
if [ "$LLAVA_WILD" != none ]; then
    needed RULE_FILE "the original rule file of LLaVA-Bench; LLAVA_WILD=none leaves that benchmark out"
    existing RULE_FILE "the original rule file"
    needed WILD_JUDGE "the judge's served name or hub id; LLAVA_WILD=none leaves that benchmark out"
    if [ "$RULE_FILE" = none ] || [ "$WILD_JUDGE" = none ]; then
        problem "LLaVA-Bench needs a rule file and a judge: set RULE_FILE and WILD_JUDGE, or LLAVA_WILD=none."
    fi
fi
if [ -n "${ADAPTER:-}" ] && [ ! -f "$ADAPTER/adapter_config.json" ]; then
    problem "ADAPTER must be a PEFT adapter's folder, but \`$ADAPTER\` holds no adapter_config.json."
fi
command -v "${mm_cb[0]}" >/dev/null ||
    problem "\`${mm_cb[0]}\` is not installed here: pip install -e . in the checkout, or set MM_CB."
if [ "${#wrong[@]}" -gt 0 ]; then
    printf 'reproduce_7b: %s\n' "${wrong[@]}" >&2
    if [ "$dry_run" = 0 ]; then
        echo "reproduce_7b: ${#wrong[@]} to set; see --help, and --dry-run for the plan." >&2
        exit 2
    fi
fi

finished() { # run directory: did the run in it come to its end?
    [ -f "$1/run.json" ] && grep -q '"ended": *"' "$1/run.json"
}

step() { # run directory, command...
    local folder="$1" state="to do"
    shift
    if finished "$folder"; then state="finished"; elif [ -e "$folder/run.json" ]; then state="begun"; fi
    carry_out "$folder" "$state" "$@"
}

names=() states=() spent=() # one entry a step that was carried out
carry_out() { # name, state, command...
    local name="$1" state="$2" start="$SECONDS"
    shift 2
    if [ "$dry_run" = 1 ]; then
        printf '%s # %s\n' "$(printf '%q ' "$@")" "$state"
        return
    fi
    printf '\n== %s (%s)\n' "$name" "$state"
    names+=("$name") states+=("stopped") spent+=(0)
    "$@"
    states[${#names[@]} - 1]="$([ "$state" = finished ] && echo finished before || echo done)"
    spent[${#names[@]} - 1]=$((SECONDS - start))
}

stages() { # what each step came to, also of a run that stopped
    local at
    if [ "${#names[@]}" = 0 ]; then return; fi
    printf '\n%-52s %-16s %9s %8s\n' stage state minutes disk
    for at in "${!names[@]}"; do
        printf '%-52s %-16s %9s %8s\n' "${names[at]#"$OUT/"}" "${states[at]}" \
            "$((spent[at] / 60)).$((spent[at] % 60 / 6))" "$(du -sh "${names[at]#judge }" 2>/dev/null | cut -f 1)"
    done
}
trap stages EXIT

judge() { # run directory: have its answers judged, unless this very command made the newest verdicts in it
    local newest="$1/judgements/newest.json" by="$1/judgements/reproduce_7b.txt" command
    local on=(--device "$DEVICE")
    case "$JUDGE" in refusal-strings | endpoint | call | miniature*) on=() ;; esac # these load no model
    command=("${mm_cb[@]}" judge "$1" --judge "$JUDGE" ${on[@]+"${on[@]}"} ${judge_more[@]+"${judge_more[@]}"})
    # A name may go on after the option's, as in `endpoint:MODEL`, but harmbench is not harmbench-multimodal.
    if [ -f "$newest" ] && [[ "$(<"$newest")" == *'"judge": "'"$JUDGE"[!A-Za-z0-9._-]* ]] &&
        [ -f "$by" ] && [ "$(<"$by")" = "$(printf '%q ' "${command[@]}")" ]; then
        if [ "$dry_run" = 1 ]; then carry_out "judge $1" finished "${command[@]}"; fi
        return # here, because the command would first load a judge of many gigabytes
    fi
    carry_out "judge $1" "to do" "${command[@]}"
    if [ "$dry_run" = 0 ]; then printf '%q ' "${command[@]}" >"$by"; fi
}

costs() { # what a dry run says behind the commands: counted work at 7B shapes, on a device that does RATE TFLOP a second
    local rate="$RATE" behaviours=133 step=39 search attack
    if [ -f "$BEHAVIORS" ]; then behaviours="$(grep -c . "$BEHAVIORS" || true)"; fi
    hours() { awk -v work="$1" -v rate="$rate" 'BEGIN {
        s = work / rate; if (s < 3600) printf "%d min", s / 60 + 1; else printf "%.1f h", s / 3600 }'; }
    line() { printf '# %-34s %10s %10s   %s\n' "$1" "$2" "$3" "$4"; }
    search=$((behaviours * STEPS * RESTARTS * step))
    local searches=$((${#subjects[@]} * (${#plain[@]} - 2) + ${#knowing[@]}))
    attack=$((searches * (search + 2 * STEPS * step * (CONVERGENCE < behaviours ? CONVERGENCE : behaviours))))
    printf '#\n# What it costs: work counted at 7B shapes, at %s TFLOP a second (RATE=; about half of what an H100 does in bfloat16).\n' "$rate"
    printf '# Nothing of it was timed on a GPU. Loading, answers and judges come on top. %s behaviours' "$behaviours"
    if [ -f "$BEHAVIORS" ]; then printf '.\n'; else printf ' are assumed, as many as the paper has.\n'; fi
    line stage time disk "why"
    line weights "" "15 GB" "$MODEL, once; a judge of 13B 26 GB more"
    if [ -z "${ADAPTER:-}" ]; then line train "$(hours $((75 * 130 + 75 * 551)))" "0.2 GB" "150 steps, text (130 TFLOP) and 336-px (551) in turn"; fi
    line attacks "$(hours "$attack")" "$((behaviours * 7 / 10 + 1)) MB" "$STEPS steps x $RESTARTS, 39 TFLOP a step: $searches searches and the checks"
    if [ "${CHECK:-}" != none ]; then line battery "$(hours $((27 * 12 * STEPS * step)))" "" "about 27 searches for each of 12 behaviours"; fi
    if [ "$FUNCTION_CALLING$HARMFUL_CALLS" = nonenone ]; then
        line agents "" "" "left out: FUNCTION_CALLING=bfcl_eval/data HARMFUL_CALLS=requests.jsonl put them in"
    fi
    if [ "$MMMU" != none ]; then line MMMU "$(hours $((${#subjects[@]} * 900 * 45)))" "4 GB" "900 questions for each of ${#subjects[@]}"; fi
}

# Every subject is attacked by the plain ones, the breaker also by those that know it: without an adapter they are PGD.
every_line() { # beginning of a field -> whether all behaviours have it
    grep -qs "$1" "$BEHAVIORS" && [ "$(grep -c "$1" "$BEHAVIORS")" = "$(grep -c . "$BEHAVIORS")" ]
}
plain=(no_attack noise pgd)
if every_line '"facts": *"'; then plain+=(pgd_facts); fi
knowing=(pgd_adaptive pgd_clean_teacher pgd_homotopy pgd_homotopy_opening)
if every_line '"form": *{'; then knowing+=(pgd_form); fi
if every_line '"harmless": *\['; then knowing+=(pgd_form_found); fi
subjects=(base)
if [ "$SAFETY_PROMPT" != none ]; then subjects+=(base+safety_prompt); fi
subjects+=(rr)
adapter="${ADAPTER:-$OUT/train}"
on=(--seed "$SEED" --device "$DEVICE" --dtype "$DTYPE")

who() { # subject -> the options that make it, in the array `who`
    who=(--model "$MODEL")
    case "$1" in
    rr) who+=(--adapter "$adapter") ;;
    base+safety_prompt) who+=(--system "$SAFETY_PROMPT") ;;
    esac
}

if [ -z "${ADAPTER:-}" ]; then
    step "$OUT/train" "${mm_cb[@]}" train "$RECIPE" --out "$OUT/train" "${on[@]}" ${train_more[@]+"${train_more[@]}"}
fi

runs=()
for subject in "${subjects[@]}"; do
    who "$subject"
    attacks=("${plain[@]}")
    if [ "$subject" = rr ]; then attacks+=("${knowing[@]}"); fi
    for attack in "${attacks[@]}"; do
        folder="$OUT/attack/$subject-$attack"
        more=(${attack_more[@]+"${attack_more[@]}"})
        case "$attack" in pgd*) more+=(--check-convergence "$CONVERGENCE" ${pgd_more[@]+"${pgd_more[@]}"}) ;; esac
        case "$attack" in pgd | pgd_facts) ;; pgd_*) more+=(${adaptive_more[@]+"${adaptive_more[@]}"}) ;; esac
        step "$folder" "${mm_cb[@]}" attack "${who[@]}" --behaviors "$BEHAVIORS" --out "$folder" --attack "$attack" \
            --epsilon "$EPSILON" --steps "$STEPS" --restarts "$RESTARTS" "${on[@]}" ${more[@]+"${more[@]}"}
        if [ "$JUDGE" != none ]; then judge "$folder"; fi
        runs+=("$folder")
    done
done

evaluate() { # benchmark, its options...: one run per subject
    local benchmark="$1" subject folder
    shift
    for subject in "${subjects[@]}"; do
        who "$subject"
        folder="$OUT/eval/$subject-$benchmark"
        step "$folder" "${mm_cb[@]}" eval "$benchmark" "${who[@]}" "$@" --out "$folder" "${on[@]}" \
            ${eval_more[@]+"${eval_more[@]}"}
        runs+=("$folder")
    done
}

if [ "$MMMU" != none ]; then evaluate mmmu --data "$MMMU"; fi
if [ "$LLAVA_WILD" != none ]; then
    evaluate llava-wild --data "$LLAVA_WILD" --rule-file "$RULE_FILE" --judge-model "$WILD_JUDGE" \
        ${WILD_ENDPOINT:+--judge-endpoint "$WILD_ENDPOINT"}
fi
if [ "$OVER_REFUSAL" != none ]; then evaluate over-refusal --data "$OVER_REFUSAL"; fi

# The agents stage: function calling kept, harmful calls with and without a forced call.
if [ "$FUNCTION_CALLING" != none ]; then evaluate function-calling --data "$FUNCTION_CALLING"; fi
if [ "$HARMFUL_CALLS" != none ]; then
    evaluate harmful-calls --data "$HARMFUL_CALLS"
    if [ "$JUDGE" != none ]; then
        for subject in "${subjects[@]}"; do judge "$OUT/eval/$subject-harmful-calls"; done
    fi
fi

if [ "${CHECK:-}" != none ]; then
    who rr
    step "$OUT/check" "${mm_cb[@]}" attack check "${who[@]}" --behaviors "$BEHAVIORS" --out "$OUT/check" \
        --epsilon "$EPSILON" "${on[@]}" --steps "$STEPS" ${check_more[@]+"${check_more[@]}"}
    runs+=("$OUT/check")
fi

carry_out "$OUT/report.html" "to do" "${mm_cb[@]}" report "${runs[@]}" --out "$OUT/report.html"
if [ "$dry_run" = 1 ]; then costs; fi
