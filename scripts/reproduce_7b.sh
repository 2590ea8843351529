#!/usr/bin/env bash
# The paper's table on one GPU: train -> check -> attack -> judge -> evaluate -> report, for base, base + safety prompt and RR.
#
#   set -a; . settings.sh; set +a               # BEHAVIORS=behaviors.jsonl, JUDGE=harmbench-multimodal, and so on, see below
#   bash scripts/reproduce_7b.sh --dry-run      # print every command
#   bash scripts/reproduce_7b.sh                # run them
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
#   BEHAVIORS      needed                                  `mm-cb data build behaviors` makes the paper's from your copies
#   SAFETY_PROMPT  none                                    text file: the operator's words in front of every request
#   EPSILON STEPS RESTARTS   32/255 1000 1                 the attacks' budget
#   ATTACK         --max-new-tokens 512                    further `mm-cb attack` arguments: "--batch 16 --max-new-tokens 512"
#   PGD            (nothing)                               more for every PGD: "--optimizer sign", the textbook's steps
#   ADAPTIVE       (nothing)                               more for those that know the breaker: "--balance"
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

needed() { # name, what it is
    [ -n "${!1:-}" ] || fail "$1 is missing: $2, or none to leave it out. See --help."
}

existing() { # name, what it is
    [ "${!1}" = none ] || [ -e "${!1}" ] || fail "$1 must be $2, but \`${!1}\` is not there."
}

[ -n "${BEHAVIORS:-}" ] || fail "BEHAVIORS is missing: the behaviours file (JSONL); \`mm-cb data build behaviors\` makes it."
[ -f "$BEHAVIORS" ] || fail "BEHAVIORS must be the behaviours file (JSONL), but \`$BEHAVIORS\` is not there."
needed JUDGE "who judges the attacked answers"
needed OVER_REFUSAL "benign look-alikes (MOSSBench, XSTest, or JSONL)"
existing OVER_REFUSAL "a file or folder of benign look-alikes"
existing SAFETY_PROMPT "a text file"
if [ "$LLAVA_WILD" != none ]; then
    needed RULE_FILE "the original rule file of LLaVA-Bench"
    existing RULE_FILE "the original rule file"
    needed WILD_JUDGE "the judge's served name or hub id"
    [ "$RULE_FILE" != none ] && [ "$WILD_JUDGE" != none ] ||
        fail "LLaVA-Bench needs a rule file and a judge: set RULE_FILE and WILD_JUDGE, or LLAVA_WILD=none."
fi
[ -z "${ADAPTER:-}" ] || [ -f "$ADAPTER/adapter_config.json" ] || fail "ADAPTER must be a PEFT adapter's folder, but \`$ADAPTER\` holds no adapter_config.json."
command -v "${mm_cb[0]}" >/dev/null || fail "\`${mm_cb[0]}\` is not installed here: pip install -e . in the checkout, or set MM_CB."

finished() { # run directory: did the run in it come to its end?
    [ -f "$1/run.json" ] && grep -q '"ended": *"' "$1/run.json"
}

step() { # run directory, command...
    local folder="$1" state="to do"
    shift
    if finished "$folder"; then state="finished"; elif [ -e "$folder/run.json" ]; then state="begun"; fi
    carry_out "$folder" "$state" "$@"
}

carry_out() { # name, state, command...
    local name="$1" state="$2"
    shift 2
    if [ "$dry_run" = 1 ]; then
        printf '%s # %s\n' "$(printf '%q ' "$@")" "$state"
    else
        printf '\n== %s (%s)\n' "$name" "$state"
        "$@"
    fi
}

judge() { # run directory: have its answers judged, unless this very command made the newest verdicts in it
    local newest="$1/judgements/newest.json" by="$1/judgements/reproduce_7b.txt" command
    command=("${mm_cb[@]}" judge "$1" --judge "$JUDGE" --device "$DEVICE" ${judge_more[@]+"${judge_more[@]}"})
    # A name may go on after the option's, as in `endpoint:MODEL`, but harmbench is not harmbench-multimodal.
    if [ -f "$newest" ] && [[ "$(<"$newest")" == *'"judge": "'"$JUDGE"[!A-Za-z0-9._-]* ]] &&
        [ -f "$by" ] && [ "$(<"$by")" = "$(printf '%q ' "${command[@]}")" ]; then
        if [ "$dry_run" = 1 ]; then carry_out "judge $1" finished "${command[@]}"; fi
        return # here, because the command would first load a judge of many gigabytes
    fi
    carry_out "judge $1" "to do" "${command[@]}"
    if [ "$dry_run" = 0 ]; then printf '%q ' "${command[@]}" >"$by"; fi
}

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
    for attack in no_attack noise pgd pgd_adaptive pgd_clean_teacher pgd_homotopy; do
        knowing=0
        case "$attack" in pgd_*) knowing=1 ;; esac
        # Without an adapter there is nothing to adapt to: on the base the adaptive attack is PGD.
        if [ "$knowing" = 1 ] && [ "$subject" != rr ]; then continue; fi
        folder="$OUT/attack/$subject-$attack"
        more=(${attack_more[@]+"${attack_more[@]}"})
        case "$attack" in pgd*) more+=(${pgd_more[@]+"${pgd_more[@]}"}) ;; esac
        if [ "$knowing" = 1 ]; then more+=(${adaptive_more[@]+"${adaptive_more[@]}"}); fi
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

if [ "${CHECK:-}" != none ]; then
    who rr
    step "$OUT/check" "${mm_cb[@]}" attack check "${who[@]}" --behaviors "$BEHAVIORS" --out "$OUT/check" \
        --epsilon "$EPSILON" "${on[@]}" --steps "$STEPS" ${check_more[@]+"${check_more[@]}"}
    runs+=("$OUT/check")
fi

carry_out "report" "to do" "${mm_cb[@]}" report "${runs[@]}" --out "$OUT/report.html"
