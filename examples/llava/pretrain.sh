#!/bin/bash
# Stage 1: the projector alone, on LLaVA's 558K pictures with captions. Run in LLaVA's folder.
set -euo pipefail
TOWER=${TOWER:-"diffenc:sdxl?grid=24&rank=16"}
HERE=$(cd "$(dirname "$0")" && pwd)

${LAUNCH:-deepspeed} "$HERE/train_diffenc.py" \
    --deepspeed ./scripts/zero2.json \
    --model_name_or_path lmsys/vicuna-7b-v1.5 \
    --version plain \
    --data_path ./playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json \
    --image_folder ./playground/data/LLaVA-Pretrain/images \
    --vision_tower "$TOWER" \
    --mm_projector_type mlp2x_gelu \
    --tune_mm_mlp_adapter True \
    --mm_use_im_start_end False \
    --mm_use_im_patch_token False \
    --bf16 True \
    --output_dir ./checkpoints/llava-diffenc-pretrain \
    --num_train_epochs 1 \
    --per_device_train_batch_size 32 \
    --gradient_accumulation_steps 1 \
    --evaluation_strategy no \
    --save_strategy steps --save_steps 24000 --save_total_limit 1 \
    --learning_rate 1e-3 --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type cosine \
    --logging_steps 1 \
    --tf32 True \
    --model_max_length 2048 \
    --gradient_checkpointing True \
    --dataloader_num_workers 4 \
    --lazy_preprocess True \
    --report_to none \
    "$@"
