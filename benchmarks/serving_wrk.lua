-- wrk against a running server: how many requests end in which status, and is one lost?
--
--     signbit serve MODEL --name model --port 8000
--     wrk -t2 -c100 -d60s --timeout 300s -s benchmarks/serving_wrk.lua http://127.0.0.1:8000/v1/completions
--
-- Every fourth completion is streamed. With more connections than slots and places in the queue the rest get 429.

wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"

local threads, sent = {}, 0
statuses = ""

function setup(thread)
  table.insert(threads, thread)
end

function request()
  sent = sent + 1
  local stream = sent % 4 == 0 and ', "stream": true' or ""
  local words = string.rep("the ferryman counted boats ", 1 + sent % 8)
  return wrk.format(nil, nil, nil, '{"model": "model", "max_tokens": 16, "prompt": "' .. words .. '"' .. stream .. "}")
end

function response(status)
  statuses = statuses .. status .. " "
end

function done(summary)
  local counts = {}
  for _, thread in ipairs(threads) do
    for status in thread:get("statuses"):gmatch("%d+") do
      counts[status] = (counts[status] or 0) + 1
    end
  end
  for status, count in pairs(counts) do
    print("status " .. status .. ": " .. count)
  end
  local errors = summary.errors
  print(string.format("lost: connect %d, read %d, write %d, timeout %d", errors.connect, errors.read, errors.write, errors.timeout))
end
