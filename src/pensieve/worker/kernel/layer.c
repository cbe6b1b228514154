/* A whole layer as one call: norms, products, rotary positions, KV written, attention. Knows no Python and no torch. */
#include "layer.h"

#include <string.h>

int64_t pensieve_layer_bytes(void) { return (int64_t)sizeof(struct layer); }

static void normalise(const struct layer *layer, const struct call *call, const float *weight, int64_t num_rows)
{
    const struct norm_rows work = {
        .call = {call->kind, call->level, layer->num_threads, num_rows}, .residual = layer->residual, .weight = weight, .output = layer->normed,
        .width = layer->qkv.num_inputs, .epsilon = layer->epsilon,
    };
    pensieve_norm(&work);
}

static void multiply(const struct layer *layer, const struct weights *weights, const uint16_t *inputs, uint16_t *results, int64_t num_rows)
{
    const struct multiply work = {weights, inputs, results, num_rows, layer->num_threads};
    pensieve_multiply(&work);
}

static void take_rows(const struct layer *layer, uint16_t *numbers, int64_t width)
{
    for (int64_t i = 0; i < layer->num_rows; i++)
        memmove(numbers + i * width, numbers + layer->rows[i] * width, (size_t)width * sizeof *numbers);
}

/* `call`: the step's, with everything that does not change from layer to layer; this fills in the rest but for sinks and window.
 * Returns 0, or the bytes of scratch that it needs, and then nothing was done. */
int64_t pensieve_layer(const struct layer *layer, struct call *call)
{
    const int64_t heads = call->num_heads, kv_heads = call->num_kv_heads, head_dim = call->head_dim, width = layer->qkv.num_outputs;
    call->query = layer->heads;
    call->key = layer->heads + heads * head_dim;
    call->value = layer->heads + (heads + kv_heads) * head_dim;
    call->query_token_stride = call->key_token_stride = call->value_token_stride = width;
    call->query_head_stride = call->key_head_stride = call->value_head_stride = head_dim;
    call->output = layer->attended;
    const struct division division = pensieve_divide(call);
    if (division.need > call->scratch_bytes)
        return division.need;

    normalise(layer, call, layer->attention_norm, layer->num_tokens);
    multiply(layer, &layer->qkv, layer->normed, layer->heads, layer->num_tokens);
    if (layer->angles || layer->query_norm) {
        const struct rotate_rows work = {
            .call = {call->kind, call->level, layer->num_threads, layer->num_tokens}, .heads = layer->heads, .row_stride = width,
            .num_heads = heads, .num_kv_heads = kv_heads, .head_dim = head_dim, .angles = layer->angles, .positions = layer->positions,
            .query_weight = layer->query_norm, .key_weight = layer->key_norm, .epsilon = layer->epsilon,
        };
        pensieve_rotate(&work);
    }
    pensieve_write(call);
    pensieve_attend_divided(call, &division);

    int64_t num_rows = layer->num_tokens;
    if (layer->rows) {
        take_rows(layer, layer->attended, layer->out.num_inputs);
        take_rows(layer, layer->residual, layer->out.num_outputs);
        num_rows = layer->num_rows;
    }
    multiply(layer, &layer->out, layer->attended, layer->residual, num_rows);
    normalise(layer, call, layer->mlp_norm, num_rows);
    multiply(layer, &layer->gate_up, layer->normed, layer->gated, num_rows);
    multiply(layer, &layer->down, layer->gated, layer->residual, num_rows);
    return 0;
}
