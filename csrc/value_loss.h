// The clipped value loss of one or two critics and its gradient in one pass.
#pragma once

#include "common.h"

namespace saferlhf {

// loss [critics], gradient, values, old_values, returns [critics, rows.tokens], inverse [1], statistics [critics, 7] (order:
// reference.py), all of dtype; normalizer [1] of dtype or null. The gradient does not include the factor `inverse`;
// masked entries are 0.
const char* value_loss_cpu(void* loss, void* gradient, void* inverse, void* statistics, const void* values,
                           const void* old_values, const void* returns, const void* normalizer, const Rows& rows,
                           int64_t critics, int dtype, double clip_value, bool token_mean, int threads);

}  // namespace saferlhf
