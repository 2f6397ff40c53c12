// The product of few rows in bfloat16, compiled by test_tiles.py with emulated tiles.
#include "cpu/linear_bf16.cpp"

void linear_tiles(const tf::LinearBf16& a) { tf::TF_ISA::linear_bf16(a); }
