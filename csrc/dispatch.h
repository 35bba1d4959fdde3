// Instruction sets: which ones the processor has, and which one runs.
#pragma once

#include <string>
#include <vector>

#include "kernels/ops.h"

namespace ssm_fast {

enum class Isa { baseline, avx2, avx512 };

std::string name(Isa isa);
std::vector<Isa> available_isas();  // of this build and this processor, narrowest first

// The level chosen when the module was loaded: SSM_FAST_ISA, or the widest available.
Isa chosen_isa();

// Reads SSM_FAST_ISA and chooses. Throws std::invalid_argument for a level that cannot run here.
void choose_isa();

}  // namespace ssm_fast
